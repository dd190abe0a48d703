"""Errors for users, and files that are written whole."""
