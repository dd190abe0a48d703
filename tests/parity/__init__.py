"""Comparisons with other implementations, live or recorded."""
