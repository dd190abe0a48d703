"""AdamW, GaLore and Muon, with one schedule and one factor on the matrices.

The matrices are the leaves that GaLore projects. Every method has two rates:
one for them, `rate * multiplier`, and `rate` for all other leaves.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import galore_optax as go
from train.common.errors import UserError

WARM_UP = 0.1  # share of the steps in which the rate rises
FINAL = 0.1  # last rate, of the highest
CLIP = 1.0  # global norm of the gradient


# Ways to read a convolution kernel (height, width, inputs, outputs). Without
# a rule it is height * width matrices of (inputs, outputs).
ONE_MATRIX = go.Projection(rows=(0, 1, 2), cols=3)
TENSOR = go.Projection(tensor=(2, 3))

Rules = tuple[tuple[str, go.Projection | None], ...]


class Options(NamedTuple):
  """What the methods share, beside the two rates.

  Attributes:
    steps: Steps of the run.
    rank: Rank of the bases; a float is a share of a matrix's shorter side.
    gap: Steps between two refreshes of a basis.
    rules: Which leaves are projected, and how they are read as matrices.
    kernels: Regular expression for the convolution kernels, if there are any.
    residual: What GaLore does with the gradient outside of its bases.
  """

  steps: int
  rank: float
  gap: int
  rules: Rules
  kernels: str | None = None
  residual: str | None = "normalized"


def make(
  method: str, rate: float, multiplier: float, options: Options
) -> optax.GradientTransformationExtraArgs:
  """An optimizer whose rates are a part of its state.

  So runs that differ in their rates alone have one compiled program.

  Args:
    method: One of `METHODS`.
    rate: Highest learning rate of the leaves that are not projected.
    multiplier: Factor on it for the matrices.
    options: What the methods share.
  """

  @functools.partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)
  def build(rate: Any, multiplier: Any) -> optax.GradientTransformation:
    rising = max(1, int(WARM_UP * options.steps))
    shape = optax.warmup_cosine_decay_schedule(
      0.0, 1.0, rising, max(options.steps, rising + 1), FINAL
    )
    return optax.chain(
      optax.clip_by_global_norm(CLIP),
      METHODS[method](lambda count: rate * shape(count), multiplier, options),
    )

  return build(rate=rate, multiplier=multiplier)


def matrices(params: Any, options: Options) -> Any:
  """True for the leaves that GaLore projects, in the parameters' structure."""
  plan = go.describe(_galore(1.0, 1.0, options), params)
  leaves = [row.rank is not None for row in plan.rows]
  return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _galore(
  rate: Any, multiplier: Any, options: Options
) -> optax.GradientTransformation:
  return go.galore_adamw(
    rate,
    weight_decay=0.0,
    rank=options.rank,
    update_proj_gap=options.gap,
    scale=multiplier,
    residual=options.residual,
    rules=options.rules,
  )


def _plain_galore(
  rate: Any, multiplier: Any, options: Options
) -> optax.GradientTransformation:
  return _galore(rate, multiplier, options._replace(residual=None))


def _galore_one_matrix(
  rate: Any, multiplier: Any, options: Options
) -> optax.GradientTransformation:
  """GaLore with each convolution kernel as one matrix."""
  return _galore(rate, multiplier, _with_kernels(options, ONE_MATRIX))


def _galore_tucker(
  rate: Any, multiplier: Any, options: Options
) -> optax.GradientTransformation:
  """GaLore with factors for inputs and outputs of each convolution kernel."""
  return _galore(rate, multiplier, _with_kernels(options, TENSOR))


def _with_kernels(options: Options, view: go.Projection) -> Options:
  if options.kernels is None:
    raise UserError(
      "this model has no convolutions to read in another way; use --optimizer"
      " galore"
    )
  return options._replace(rules=((options.kernels, view), *options.rules))


def _adamw(
  rate: Any, multiplier: Any, options: Options
) -> optax.GradientTransformation:
  mask = lambda params: matrices(params, options)
  return optax.chain(
    optax.scale_by_adam(),
    optax.masked(optax.scale(multiplier), mask),
    optax.scale_by_learning_rate(rate),
  )


def _muon(
  rate: Any, multiplier: Any, options: Options
) -> optax.GradientTransformation:
  """Muon for the matrices, read as GaLore reads them, and Adam for the rest."""

  def labels(params: Any) -> Any:
    return jax.tree.map(
      lambda projected: "muon" if projected else "adam",
      matrices(params, options),
    )

  muon = optax.chain(
    optax.contrib.scale_by_muon(
      weight_dimension_numbers=lambda tree: _axes(tree, options)
    ),
    optax.scale(multiplier),
  )
  return optax.chain(
    optax.partition({"muon": muon, "adam": optax.scale_by_adam()}, labels),
    optax.scale_by_learning_rate(rate),
  )


def _axes(params: Any, options: Options) -> Any:
  """Which axes of each leaf are rows and columns, for Muon."""
  plan = go.describe(_galore(1.0, 1.0, options), params)
  leaves = [_axes_of(row.path, options.rules) for row in plan.rows]
  return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _axes_of(path: str, rules: Rules) -> optax.contrib.MuonDimensionNumbers:
  found = (view for regex, view in rules if re.search(regex, path))
  view = next(found, None) or go.Projection()
  rows = -2 if view.rows is None else view.rows
  columns = -1 if view.cols is None else view.cols
  return optax.contrib.MuonDimensionNumbers(rows, columns)


METHODS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "adamw": _adamw,
  "galore": _galore,
  "galore_plain": _plain_galore,
  "galore_one_matrix": _galore_one_matrix,
  "galore_tucker": _galore_tucker,
  "muon": _muon,
}
