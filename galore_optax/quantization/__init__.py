"""Quantized arrays with codes of 4 and 8 bits."""
