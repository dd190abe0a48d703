"""What the names of leaves and of their axes say."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Paths of leaves that the papers leave at full rank: embeddings, output heads,
# norms, and vectors, which have two axes where layers are stacked. Keys of flat
# dicts join names by dots. A node without names of its own, such as the
# NamedArray of Haliax, adds an index at the end.
_FULL_RANK_PATHS = re.compile(
  r"(^|[./])[^./]*(embed|norm)[^./]*([./]|$)"
  r"|(^|[./])(wte|wpe|ln|ln_?\w{1,3}|lm_head|unembed\w*)([./]|$)"
  r"|(^|[./])(\w+_)?(embs?|logits(_dense)?)([./]|$)"
  r"|(^|[./])(head|output|classifier|score)([./](kernel|weight|w)([./]\d+)?)?$"
  r"|(^|[./])(bias|scale|offset|gamma|beta)([./]\d+)?$",
  re.IGNORECASE,
)

# What `optax.contrib.split_real_and_imaginary` adds to the path of a leaf.
_PART = re.compile(r"[./](real|imaginary)$")

# The reason for full rank that is guessed from a path.
NAME = "its name"

# Names of axes that count layers, and of axes that count experts.
_LAYERS = re.compile(
  r"(^|[._-])(layer|block|stage|stack|repeat)s?$", re.IGNORECASE
)
_EXPERTS = re.compile(r"(^|[._-])experts?$", re.IGNORECASE)


def stacked_axes(names: Sequence[Any]) -> tuple[int, ...]:
  """The axes of a leaf that count matrices, by their names.

  Args:
    names: One entry an axis: a name, several names, or None.

  Returns:
    Numbers of the axes that count layers. Also of those that count experts, if
    at least two other axes are left: a router has one column an expert.
  """

  def named(pattern: re.Pattern) -> set[int]:
    entries = [x if isinstance(x, tuple | list) else (x,) for x in names]
    return {
      axis
      for axis, entry in enumerate(entries)
      if any(isinstance(x, str) and pattern.search(x) for x in entry)
    }

  layers = named(_LAYERS)
  both = layers | named(_EXPERTS)
  return tuple(sorted(both if len(names) - len(both) >= 2 else layers))


def is_bias(path: str, leaves: Mapping[str, Any]) -> bool:
  """Whether a leaf is Haiku's `b` beside `w`, also where layers are stacked."""
  beside = re.sub(r"(^|[./])b((?:[./](?:real|imaginary))?)$", r"\1w\2", path)
  if beside == path or beside not in leaves:
    return False
  return np.ndim(leaves[beside]) == np.ndim(leaves[path]) + 1


def is_of_full_rank(path: str) -> bool:
  """Whether a leaf's path says that it is no weight matrix of a layer."""
  return bool(_FULL_RANK_PATHS.search(_PART.sub("", path)))
