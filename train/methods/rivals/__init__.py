"""Rivals: other methods that train all weights with little state.

Each is written from the equations in its docstring, which names their source.
Their functions take what those of `transforms.py` take.
"""
