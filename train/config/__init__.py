"""The config of a run: its schema, presets and command line."""
