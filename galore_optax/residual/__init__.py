"""What becomes of the part of a gradient that the bases do not span."""
