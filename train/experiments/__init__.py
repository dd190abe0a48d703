"""Small versions of the papers' tables, on real text."""
