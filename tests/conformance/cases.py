"""The optimizers that hold one contract, and small problems to run them on.

`OPTIMIZERS` has a row for every public transformation, and `optax.adamw` as the
control that a test is fair. Beside each stands the Optax optimizer that it
wraps, without GaLore. A test runs over one of three lists:

- `every_public`: all rows, in the one setting that all must hold,
- `every_layout`: one row for each way in which a state is stored, where storing
  and sharding it matters,
- `every`: one row for each kind of state that updates go through, everywhere
  else; `every_with_slow_codes` where the kinds differ least.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import (
  GaLoreState,
  Refresh,
  adamw_8bit,
  apollo_mini_adamw,
  chain,
  find_bases,
  galore,
  galore_adafactor,
  galore_adamw,
  galore_adamw_8bit,
  galore_lion,
  galore_sgd,
  gum,
  ldadam,
  q_galore_adamw_8bit,
  scale_by_orthogonal_momentum,
  sumo,
)
from tests.marks import with_slow

RANK, GAP, RATE, DECAY = 2, 2, 1e-2, 0.1
SHAPES = {"bias": (16,), "kernel": (8, 16)}
# GUM draws some of the matrices of a shape, so that it needs more than one.
SHAPES_OF = {"gum": {"bias": (16,), "kernel": (2, 8, 16)}}
KERNEL_ONLY = {"bias": False, "kernel": True}

Make = Callable[..., optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Case:
  """One optimizer: with GaLore, and the same without it.

  Both are called with a learning rate and GaLore's settings, which mean nothing
  to `plain`. `alias` is the public factory if the spelling is one, and `fixed`
  what it is called with.
  """

  make: Make
  plain: Make
  alias: Make | None = None
  fixed: dict[str, Any] = dataclasses.field(default_factory=dict)


def _alias(alias: Make, plain: Make, **fixed: Any) -> Case:
  def make(rate=RATE, **settings):
    return alias(rate, **_filled({**fixed, **settings}))

  return Case(make, plain, alias, fixed)


def _adamw(rate=RATE, **settings):
  del settings
  return optax.adamw(rate, weight_decay=DECAY)


def _adafactor(rate=RATE, **settings):
  del settings
  return optax.adafactor(
    rate,
    min_dim_size_to_factor=2,
    multiply_by_parameter_scale=False,
    momentum=0.9,
    dtype_momentum=jnp.float32,
  )


def _sgd(rate=RATE, **settings):
  del settings
  return optax.sgd(rate, 0.9)


def _lion(rate=RATE, **settings):
  del settings
  return optax.lion(rate)


def _orthogonal(rate=RATE, **settings):
  del settings
  kinds = {
    "matrix": scale_by_orthogonal_momentum(),
    "other": optax.scale_by_adam(),
  }
  label = lambda params: jax.tree.map(
    lambda x: "matrix" if jnp.ndim(x) > 1 else "other", params
  )
  return optax.chain(
    optax.partition(kinds, label),
    optax.add_decayed_weights(DECAY),
    optax.scale_by_learning_rate(rate),
  )


def _clipped(rate=RATE, **settings):
  del settings
  return optax.chain(optax.clip_by_global_norm(1.0), _adamw(rate))


def _parts(rate=RATE, **settings):
  del settings
  return optax.chain(
    optax.scale_by_adam(),
    optax.add_decayed_weights(DECAY),
    optax.scale_by_learning_rate(rate),
  )


def _adamw_8bit(rate=RATE, **settings):
  del settings
  return adamw_8bit(rate, weight_decay=DECAY, min_size=0)


def _chain(rate=RATE, **settings):
  return chain(
    optax.clip_by_global_norm(1.0), galore(**_filled(settings)), _adamw(rate)
  )


def _optax_chain(rate=RATE, **settings):
  return optax.chain(
    galore(optax.scale_by_adam(), **_filled(settings)),
    optax.add_decayed_weights(DECAY),
    optax.scale_by_learning_rate(rate),
  )


def _filled(settings: dict[str, Any]) -> dict[str, Any]:
  return {"rank": RANK, "update_proj_gap": GAP, **settings}


CONTROL = "adamw"
OPTIMIZERS = {
  "galore_adamw": _alias(galore_adamw, _adamw, weight_decay=DECAY),
  "galore_adafactor": _alias(
    galore_adafactor, _adafactor, min_dim_size_to_factor=2
  ),
  "galore_sgd": _alias(galore_sgd, _sgd),
  "galore_lion": _alias(galore_lion, _lion),
  "chain(galore)": Case(_chain, _clipped),
  "optax.chain(galore)": Case(_optax_chain, _parts),
  "faithful": _alias(galore_adamw, _adamw, weight_decay=DECAY, faithful=True),
  "two-sided": _alias(
    galore_adamw, _adamw, weight_decay=DECAY, proj_type="full"
  ),
  "burst": _alias(
    galore_adamw, _adamw, weight_decay=DECAY, refresh=Refresh(burst=2)
  ),
  "fira": _alias(galore_adamw, _adamw, weight_decay=DECAY, residual="fira"),
  "factored": _alias(
    galore_adamw,
    _adamw,
    weight_decay=DECAY,
    residual="factored",
    residual_growth=1.01,
  ),
  "galore_adamw_8bit": _alias(
    galore_adamw_8bit, _adamw_8bit, weight_decay=DECAY, min_size=0
  ),
  "q_galore_adamw_8bit": _alias(
    q_galore_adamw_8bit,
    _adamw_8bit,
    b2=0.999,
    weight_decay=DECAY,
    min_size=0,
  ),
  "apollo_mini": _alias(apollo_mini_adamw, _adamw, weight_decay=DECAY, rank=1),
  "sumo": _alias(sumo, _orthogonal, weight_decay=DECAY),
  "gum": _alias(gum, _orthogonal, weight_decay=DECAY),
  "ldadam": _alias(ldadam, _adamw, weight_decay=DECAY),
  "adamw_8bit": Case(_adamw_8bit, _adamw_8bit),
  CONTROL: Case(_adamw, _adamw),
}
FULL_RANK = (CONTROL, "adamw_8bit")
# Moments of Adam's kind, factored ones, and codes with 4-bit bases.
GALORE = ("galore_adamw", "galore_adafactor", "q_galore_adamw_8bit")
# And two bases a matrix, norms, means of rows and columns, seeds, slots for
# sampled matrices, an error.
LAYOUTS = (
  *GALORE,
  "two-sided",
  "fira",
  "factored",
  "apollo_mini",
  "gum",
  "ldadam",
  "adamw_8bit",
  CONTROL,
)
ALIASES = [name for name, case in OPTIMIZERS.items() if case.alias]


every = pytest.mark.parametrize(
  "name", with_slow([*GALORE, CONTROL], "galore_adafactor")
)
# The same where codes are arrays like others, and take long to compile.
every_with_slow_codes = pytest.mark.parametrize(
  "name",
  with_slow([*GALORE, CONTROL], "galore_adafactor", "q_galore_adamw_8bit"),
)
# Those whose state holds arrays alone, no codes with their scales.
every_of_arrays = pytest.mark.parametrize(
  "name", ["galore_adamw", "galore_adafactor", CONTROL]
)
every_layout = pytest.mark.parametrize("name", LAYOUTS)
every_public = pytest.mark.parametrize("name", list(OPTIMIZERS))
every_galore = pytest.mark.parametrize(
  "name", with_slow(GALORE, "galore_adafactor")
)

# What Optax's own optimizer fails without GaLore too, and why. Where a row is
# listed, `hold` asserts both failures, so that no entry outlives its reason.
OPTAX_FAILS = {
  ("nan gradient", CONTROL): "a NaN never leaves Adam's moments",
  ("bfloat16 with float32 gradients", CONTROL): (
    "moments take the gradients' dtype at an update"
  ),
  ("values in float16", CONTROL): "squared gradients and eps vanish in nu",
  ("rank-one gradient", CONTROL): "the root in Adam has no slope at zero",
  ("rank-one gradient", "galore_adafactor"): (
    "nor has that in Adafactor, whose mean over rows carries it to all of them"
  ),
  ("annotated bias", "galore_adafactor"): (
    "flax copies a bias's axes on Adafactor's placeholders of shape (1,)"
  ),
  ("boxed bias", "galore_adafactor"): "the same",
  ("stacked", "galore_adafactor"): (
    "Adafactor factors the two longest axes, be they layers"
  ),
}


def hold(row: str, name: str, check: Callable[[Make], None]) -> None:
  """Runs the check of a row, or asserts that Optax alone fails it as well."""
  case = OPTIMIZERS[name]
  if (row, name) not in OPTAX_FAILS:
    check(case.make)
    return
  for make in (case.plain, case.make):
    with pytest.raises((AssertionError, TypeError, ValueError)):
      check(make)


def make(name: str, rate: Any = RATE, **settings: Any):
  """The optimizer of a name; the control has no settings."""
  return OPTIMIZERS[name].make(rate, **settings)


@functools.cache
def built(name: str):
  """The optimizer of a name with its defaults, and its compiled update."""
  tx = make(name)
  return tx, jax.jit(tx.update)


def normal(shapes: Any, seed: int = 0, dtype: Any = jnp.float32) -> Any:
  """A tree of random arrays in the structure of a tree of shapes."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple) and all(type(d) is int for d in x),
  )


@functools.cache
def problem(steps: int = 3, dtype: Any = jnp.float32, name: str = CONTROL):
  """Parameters and the gradients of some steps, for the optimizer of a name."""
  shapes = SHAPES_OF.get(name, SHAPES)
  grads = [normal(shapes, seed, dtype) for seed in range(1, steps + 1)]
  return normal(shapes, 0, dtype), grads


def run(tx, params, grads, update=None):
  """Parameters and state after a step on each of the gradients."""
  state = tx.init(params)
  update = update or jax.jit(tx.update)
  for g in grads:
    updates, state = update(g, state, params)
    params = optax.apply_updates(params, updates)
  return params, state


@functools.cache
def reference(name: str):
  """What `run` gives for the optimizer of a name on the `problem`."""
  tx, update = built(name)
  return run(tx, *problem(name=name), update)


def assert_close(
  found: Any, wanted: Any, rtol: float = 1e-5, atol: float = 1e-6
):
  """Asserts equal structures and nearly equal values."""
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      np.asarray(x, np.float64), np.asarray(y, np.float64), rtol, atol
    ),
    found,
    wanted,
  )


def assert_equal(found: Any, wanted: Any):
  """Asserts equal structures, dtypes and values."""
  assert types(found) == types(wanted)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def assert_finite(tree: Any):
  """Asserts that no leaf holds NaN or infinity."""
  for keys, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
    assert bool(jnp.all(jnp.isfinite(x))), jax.tree_util.keystr(keys)


def types(tree: Any):
  """Structure, shapes and dtypes."""
  leaves, treedef = jax.tree.flatten(tree)
  return treedef, [(jnp.shape(x), jnp.result_type(x)) for x in leaves]


def galore_states(state: Any) -> list[GaLoreState]:
  """The GaLore states in a state."""
  leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, GaLoreState))
  return [x for x in leaves if isinstance(x, GaLoreState)]


def bases(state: Any) -> dict[str, Any]:
  """Path to side to basis, as an array, of all GaLore states in a state."""
  return find_bases(state)


def assert_projects(name: str, state: Any, paths: Any = ("kernel",)):
  """Asserts that GaLore is at work in a state, and on these leaves."""
  assert set(bases(state)) == (set() if name in FULL_RANK else set(paths))
