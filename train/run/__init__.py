"""The life of a run: loop, checkpoints, metrics, its folder."""
