"""Ready optimizers: recipes around `galore`, 8-bit Adam and others."""
