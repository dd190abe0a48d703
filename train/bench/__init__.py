"""Benchmarks, each measured together with its peers in one process."""
