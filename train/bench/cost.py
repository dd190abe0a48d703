"""Soon."""

QUICK: dict = {}


def add_arguments(parser):
  pass
