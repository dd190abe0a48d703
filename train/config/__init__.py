"""What a run is: its schema, presets and command line."""
