"""Loads and saves pretrained weights and tokenizers."""
