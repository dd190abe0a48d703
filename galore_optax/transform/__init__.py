"""The transformation behind `galore`: its state, its first and other steps."""
