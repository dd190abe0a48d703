"""Errors for users, atomic file writes, and numbers as text."""
