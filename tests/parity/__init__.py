"""Comparisons with other implementations, run live or recorded."""
