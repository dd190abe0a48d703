"""`chain`: GaLore in a chain, around the transformations that come after it."""

import warnings
from collections.abc import Callable
from typing import Any

import optax

from galore_optax.tree import split


class Marker(optax.GradientTransformationExtraArgs):
  r"""The result of `galore` without an inner optimizer.

  In :func:`galore_optax.chain` the transformations after it become its inner
  optimizer. Calling it with an inner optimizer wraps that one. Used as a
  transformation, it is the low-rank filter :math:`P P^\top G`.
  """

  wrap: Callable[
    [optax.GradientTransformation], optax.GradientTransformationExtraArgs
  ]

  def __call__(
    self, inner: optax.GradientTransformation
  ) -> optax.GradientTransformationExtraArgs:
    """GaLore with the same settings around an inner optimizer."""
    return self.wrap(inner)


_FILTER = """\
galore() without an inner optimizer only filters gradients: the moments of the \
optimizer before or after it are full-size and no memory is saved. \
`galore_optax.chain(galore(rank=...), optimizer)`, in this order, or \
`galore(optimizer, rank=...)` saves memory."""

_LAST = """\
galore() comes last in the chain, after the optimizer: it only filters the \
finished updates, the moments are full-size and no memory is saved. Put it \
before the optimizer: `chain(galore(rank=...), optimizer)`."""


def marker(wrap: Callable, warning: str = _FILTER) -> Marker:
  """A marker that wraps inner optimizers with `wrap`.

  Args:
    wrap: From an inner optimizer to GaLore around it.
    warning: The warning of `init` if the marker is used as a transformation.

  Returns:
    The marker.
  """
  low_rank_filter = wrap(optax.identity())

  def init(params):
    if not split.is_placeholder(params):
      warnings.warn(warning, stacklevel=4)
    return low_rank_filter.init(params)

  result = Marker(init, low_rank_filter.update)
  result.wrap = wrap
  return result


def check_inner(inner: Any) -> None:
  """Raises unless `inner` is a gradient transformation and not a marker."""
  if isinstance(inner, Marker):
    raise TypeError(
      "`inner` is a `galore(...)` without an inner optimizer. Give one of the "
      "two the optimizer: `galore(optax.adamw(1e-3), rank=128)`."
    )
  if not isinstance(inner, optax.GradientTransformation):
    raise TypeError(
      "`inner` must be an Optax gradient transformation, got "
      f"{inner!r}. Pass the rank by name: `galore(rank=128)`."
    )


def chain(
  *transforms: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  r"""`optax.chain` in which `galore(...)` wraps the transformations after it.

  These become its inner optimizer, and their state is low-rank. Without a
  `galore(...)` this is `optax.chain`.

  Args:
    *transforms: Gradient transformations, at most one of them a
      :func:`galore_optax.galore` without an inner optimizer.

  Returns:
    The chained transformation. If nothing comes after `galore(...)`, because
    the optimizer is before it or in an outer chain, GaLore only filters
    gradients, and `init` warns.

  Raises:
    ValueError: If there is more than one `galore(...)` without an optimizer.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> from galore_optax import chain, galore
    >>> tx = chain(
    ...   optax.clip_by_global_norm(1.0),
    ...   galore(rank=128),
    ...   optax.adamw(1e-3, weight_decay=0.1),
    ... )
    >>> params = {"w": jnp.zeros((512, 1376))}
    >>> optax.tree.get(tx.init(params), "mu").low["w"].shape
    (128, 1376)
  """
  markers = {i: tx for i, tx in enumerate(transforms) if isinstance(tx, Marker)}
  positions = list(markers)
  if not positions:
    return optax.chain(*transforms)
  if len(positions) > 1:
    raise ValueError(
      "`chain` takes one `galore(...)` without an inner optimizer, got "
      f"{len(positions)}, at the positions {positions}."
    )
  before, after = transforms[: positions[0]], transforms[positions[0] + 1 :]
  if not after:
    # There is nothing to run in the subspace: the marker is a filter and warns.
    last = marker(markers[positions[0]].wrap, _LAST if before else _FILTER)
    return optax.chain(*before, last)
  inner = after[0] if len(after) == 1 else optax.chain(*after)
  return optax.chain(*before, markers[positions[0]].wrap(inner))
