"""What an inner optimizer computes, read off its operations (its jaxpr)."""
