"""Files that start a run on several hosts: docs/how-to/launching.md."""
