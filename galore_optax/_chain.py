"""How an inner optimizer is reached from within a chain."""

import warnings
from collections.abc import Callable
from typing import Any

import optax

from galore_optax.tree import split


class Marker(optax.GradientTransformationExtraArgs):
  r"""What `galore` returns without an inner optimizer.

  In :func:`galore_optax.chain` the transformations after it become the inner
  optimizer. Called on an inner optimizer it wraps it. Used as it is, it is the
  low-rank filter :math:`P P^\\top G`.
  """

  wrap: Callable[
    [optax.GradientTransformation], optax.GradientTransformationExtraArgs
  ]

  def __call__(
    self, inner: optax.GradientTransformation
  ) -> optax.GradientTransformationExtraArgs:
    """The same settings around an inner optimizer."""
    return self.wrap(inner)


_FILTER = """\
galore() without an inner optimizer only filters gradients: the moments of the \
optimizer before or after it are full-size and no memory is saved. \
`galore_optax.chain(galore(rank=...), optimizer)`, in this order, or \
`galore(optimizer, rank=...)` saves it."""

_LAST = """\
galore() comes last in the chain, after the optimizer: it only filters the \
finished updates, the moments are full-size and no memory is saved. Put it \
before: `chain(galore(rank=...), optimizer)`."""


def marker(wrap: Callable, warning: str = _FILTER) -> Marker:
  """A marker with these settings.

  Args:
    wrap: Wraps an inner optimizer.
    warning: What `init` says where nobody has unwrapped it.

  Returns:
    The marker, which is a low-rank filter where nobody unwraps it.
  """
  plain = wrap(optax.identity())

  def init(params):
    if not split.is_placeholder(params):
      warnings.warn(warning, stacklevel=4)
    return plain.init(params)

  made = Marker(init, plain.update)
  made.wrap = wrap
  return made


def check_inner(inner: Any) -> None:
  """Raises unless `inner` can be an inner optimizer, as far as can be seen."""
  if isinstance(inner, Marker):
    raise TypeError(
      "`inner` is a `galore(...)` without an inner optimizer. Give one of the "
      "two the optimizer: `galore(optax.adamw(1e-3), rank=128)`."
    )
  if not isinstance(inner, optax.GradientTransformation):
    raise TypeError(
      "`inner` must be an Optax gradient transformation, got "
      f"{inner!r}. Ranks go by name: `galore(rank=128)`."
    )


def chain(
  *transforms: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  r"""`optax.chain`, in which `galore(...)` reaches what comes after it.

  The transformations after the marker become its inner optimizer and keep
  their state at low rank. Without a marker this is `optax.chain`.

  Args:
    *transforms: Gradient transformations, at most one of them a
      :func:`galore_optax.galore` without an inner optimizer.

  Returns:
    The chained transformation. Where nothing comes after the marker, because
    the optimizer stands before it or in an outer chain, it only filters, and
    warns at `init`.

  Raises:
    ValueError: If there is more than one marker.

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
  places = list(markers)
  if not places:
    return optax.chain(*transforms)
  if len(places) > 1:
    raise ValueError(
      "`chain` takes one `galore(...)` without an inner optimizer, got "
      f"{len(places)}, at the positions {places}."
    )
  before, after = transforms[: places[0]], transforms[places[0] + 1 :]
  if not after:
    # Nothing to run in the subspace: the marker is a filter, and says so.
    last = marker(markers[places[0]].wrap, _LAST if before else _FILTER)
    return optax.chain(*before, last)
  inner = after[0] if len(after) == 1 else optax.chain(*after)
  return optax.chain(*before, markers[places[0]].wrap(inner))
