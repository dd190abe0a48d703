"""Estimates of what a run takes: bytes, FLOPs, communication."""
