"""The training step: loss, gradients, optimizer."""
