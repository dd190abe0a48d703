"""Gradients of rank r that are computed without the full gradient."""
