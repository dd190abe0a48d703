"""Updates inside the backward pass, one layer at a time."""
