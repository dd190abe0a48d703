"""The papers' tables in small, on real text: `python -m train.experiments`."""
