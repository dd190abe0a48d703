"""What the options of `galore` mean together, and which exclude each other."""

from collections.abc import Mapping
from typing import Any

import jax

from galore_optax import checks
from galore_optax.subspace import adaptive as adaptive_lib
from galore_optax.subspace import find
from galore_optax.subspace import refresh as refresh_lib

# What the paper and its code do, where our defaults differ.
_PAPER = {"projector": "svd", "refresh": "synchronous", "moments": "keep"}
_OURS = {
  "projector": "subspace",
  "refresh": "staggered",
  "moments": "rotate",
}


def refresh_of(
  *,
  method: str,
  policy: str,
  moments: str,
  iterations: Any,
  adaptive: adaptive_lib.Adaptive | None,
  share: bool,
  random_from: Any,
  seed: Any,
  faithful: bool,
) -> refresh_lib.Refresh:
  """How bases are refreshed, from the options of :func:`galore_optax.galore`.

  Args:
    method: `projector` there; the others have their names there, too.
    policy: `refresh` there.
    moments: What becomes of the moments.
    iterations: Subspace iterations of a refresh.
    adaptive: When a subspace counts as settled.
    share: `share_refresh` there.
    random_from: Step from which on bases are drawn.
    seed: Seed of these.
    faithful: Whether it is the paper's algorithm.

  Returns:
    The settings of a refresh.

  Raises:
    ValueError: If an option is out of its range, or contradicts another.
    TypeError: If an option is of the wrong type.
  """
  checks.check_choice("projector", method, find.METHODS)
  checks.check_choice("refresh", policy, refresh_lib.POLICIES)
  checks.check_choice("moments", moments, refresh_lib.MOMENTS)
  checks.check_positive("iterations", iterations)
  if not isinstance(iterations, jax.core.Tracer) and iterations % 1:
    raise ValueError(f"`iterations` must be a whole number, got {iterations}.")
  _check_adaptive(adaptive, policy, method)
  if faithful:
    _check_faithful(
      {"projector": method, "refresh": policy, "moments": moments}
    )
    method, policy, moments = _PAPER.values()
  how = refresh_lib.Refresh(
    policy=policy,
    method=method,
    moments=moments,
    iterations=iterations,
    adaptive=adaptive or adaptive_lib.Adaptive(),
    share=share,
    random_from=random_from,
    seed=seed,
  )
  _check_late(how, faithful)
  return how


def check_accumulation(steps: Any) -> int:
  """The number of gradients that make a step; raises unless it is one."""
  # None by default, for `optax.inject_hyperparams` would trace an int.
  if steps is None:
    return 1
  if isinstance(steps, bool) or not isinstance(steps, int):
    raise TypeError(
      f"`accumulation_steps` must be an int, got {steps!r}: it decides the "
      "structure of the state."
    )
  if steps < 1:
    raise ValueError(f"`accumulation_steps` must be positive, got {steps}.")
  return steps


def _check_faithful(chosen: Mapping[str, str]) -> None:
  for name, value in chosen.items():
    if value not in (_OURS[name], _PAPER[name]):
      raise ValueError(
        f"`faithful=True` means {name}={_PAPER[name]!r}, got {value!r}. Leave "
        "one of the two out."
      )


def _check_adaptive(
  adaptive: adaptive_lib.Adaptive | None, refresh: str, projector: str
) -> None:
  if adaptive is None:
    return
  if not isinstance(adaptive, adaptive_lib.Adaptive):
    raise TypeError(
      f"`adaptive` must be a galore_optax.Adaptive, got {adaptive!r}."
    )
  if refresh != "adaptive":
    raise ValueError(
      f'`adaptive` is for refresh="adaptive", got refresh={refresh!r}. Leave '
      "one of the two out."
    )
  if adaptive.measure == "cosine" and projector != "svd":
    raise ValueError(
      'measure="cosine" compares leading singular vectors, which only '
      f'projector="svd" tells apart, got projector={projector!r}. Use '
      'measure="overlap".'
    )


def _check_late(how: refresh_lib.Refresh, faithful: bool) -> None:
  if how.random_from is None:
    return
  checks.check_number("random_from", how.random_from)
  for name, value, wrong in (
    ("projector", how.method, how.method == "random"),
    ("moments", how.moments, how.moments == "ldadam"),
    ("faithful", faithful, faithful),
  ):
    if wrong:
      raise ValueError(
        f"`random_from` draws bases late, which {name}={value!r} does not go "
        "with. Leave one of the two out."
      )
