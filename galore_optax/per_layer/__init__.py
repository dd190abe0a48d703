"""Updates the weights inside the backward pass, one layer at a time."""
