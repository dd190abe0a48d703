"""Bases: how they are found, refreshed and applied to gradients."""
