"""Timing, machine descriptions, figures and pages of bench and experiments."""
