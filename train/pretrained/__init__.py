"""Weights and tokenizers of other libraries, in and out."""
