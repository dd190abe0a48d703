"""Benchmarks, each side by side with its peers in one process and one run."""
