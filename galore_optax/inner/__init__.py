"""What an inner optimizer does, read off its jaxpr."""
