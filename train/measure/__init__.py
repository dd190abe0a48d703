"""Clocks, machine descriptions and figures for bench and experiments."""
