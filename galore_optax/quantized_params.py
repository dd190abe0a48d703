"""Trains weights that are stored in eight bits or fewer."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import checks
from galore_optax.quantization import qarray
from galore_optax.tree import paths, sharding, slices

# Formats of trained weights.
KINDS = ("int8", "int4", "float8")


def quantize_params(
  params: optax.Params, rules: Any = ("kernel$",), kind: str = "int8"
) -> Any:
  r"""Quantizes the weights whose paths match a rule.

  Compute with `dequantize_params(params)`, never with the result itself.
  Operators on a quantized weight raise. `jax.tree.map`, and all that is built
  on it, applies to the codes and scales of a weight. That raises where it gives
  numbers of another dtype or without axes, as `optax.tree.norm`, `sum`, `vdot`
  and `max` do, `optax.tree.scale(0.5, params)`, `optax.tree.cast`,
  `optax.incremental_update` and `optax.ema`. **Not noticed, and wrong:**

  * `optax.tree.size`, and `jax.tree.leaves` with any sum over it,
  * `optax.tree.add`, `sub` and `mul`, and `optax.apply_updates`, of two
    quantized trees; `optax.tree.scale` by an integer; `optax.tree.clip`,
    `ones_like` and `full_like`: codes keep their dtype,
  * with `kind="float8"`, also `optax.tree.scale`, `add_scale`, `div` and means
    over steps, because JAX keeps float8 in products with Python numbers.

  Moving and selecting entries is right: `optax.tree.zeros_like`,
  `optax.tree.where`, slices of stacked layers, shardings, checkpoints.

  Args:
    params: Parameters; leaves that are quantized already are unchanged.
    rules: Regular expressions. A leaf of two axes or more is quantized if one
      of them is found in its path (`re.search` in `layers/attn/q/kernel`).
    kind: `int8`, `int4` or `float8`, see :func:`galore_optax.quantize`.

  Returns:
    The parameters, with a :class:`galore_optax.QArray` for each such leaf.

  Raises:
    ValueError: If `kind` is unknown, or a rule is not a regular expression or
      matches no leaf of two axes or more.
    TypeError: If `rules` is not a sequence of strings, or a leaf does not have
      real floating-point entries.

  Example:
    >>> params = {"kernel": jnp.ones((512, 256)), "bias": jnp.ones(256)}
    >>> small = quantize_params(params)
    >>> small["kernel"].codes.dtype.name, small["bias"].dtype.name
    ('int8', 'float32')
  """
  checks.check_choice("kind", kind, KINDS)
  rules = rules if isinstance(rules, str) else tuple(rules)
  _check_rules(rules, params)

  def one(path: str, x: Any) -> Any:
    matches = any(re.search(rule, path) for rule in rules)
    if qarray.is_quantized(x) or not matches or jnp.ndim(x) < 2:
      return x
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
      raise TypeError(
        f"The leaf {path!r} is {jnp.result_type(x)}; only real floating-point "
        "weights are quantized. Give `rules` that do not match it."
      )
    return _quantize(x, kind)

  return paths.map_with_path(one, params)


def dequantize_params(params: optax.Params, dtype: Any = None) -> Any:
  """Parameters with all quantized weights read as arrays, for the model.

  Args:
    params: Parameters, some of them quantized.
    dtype: Dtype of the weights that were quantized; None for float32.

  Returns:
    Parameters without quantized leaves. All other leaves are unchanged.

  Example:
    >>> params = quantize_params({"kernel": jnp.ones((512, 256))})
    >>> dequantize_params(params, jnp.bfloat16)["kernel"].dtype.name
    'bfloat16'
  """
  return jax.tree.map(
    lambda x: (
      _dequantize(x, dtype or jnp.float32) if qarray.is_quantized(x) else x
    ),
    params,
    is_leaf=qarray.is_quantized,
  )


def apply_updates(
  params: optax.Params, updates: optax.Updates, key: jax.Array | None
) -> Any:
  r"""Adds updates to parameters of which some are quantized.

  A quantized weight is dequantized, updated and quantized again,

  .. math::

    W \leftarrow Q(D(W) + U)

  with stochastic rounding, so that updates smaller than a step between two
  levels are right in expectation. A block keeps its levels while they fit. With
  new levels at each update, as in the reference code, weights that hardly
  change would drift. A block whose update is zero does not change. To all other
  parameters updates are added as by `optax.apply_updates`.

  Args:
    params: Parameters, some of them quantized.
    updates: Updates in the shapes of the weights; leaves that are None are
      skipped.
    key: Random key of this step. None rounds to the nearest, which loses small
      updates and is meant for comparisons. float8 is always rounded to the
      nearest.

  Returns:
    The new parameters, in the formats of the old ones.

  Raises:
    TypeError: If updates are quantized, which happens if the gradient was taken
      at quantized weights.
    ValueError: If the update of a quantized weight has another shape.

  Example:
    >>> params = quantize_params({"kernel": jnp.ones((512, 256))})
    >>> updates = {"kernel": jnp.full((512, 256), 1e-4)}
    >>> new = apply_updates(params, updates, jax.random.key(0))
    >>> mean = jnp.mean(dequantize_params(new)["kernel"])
    >>> bool(jnp.abs(mean - 1.0001) < 2e-5)
    True

  References:
    Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024, section
    3.4.
  """
  _check_updates(params, updates)
  flat, treedef = jax.tree.flatten(params, is_leaf=qarray.is_quantized)
  changes = treedef.flatten_up_to(updates)

  def one(i: int, x: Any, u: Any) -> Any:
    if u is None:
      return x
    if not qarray.is_quantized(x):
      return optax.apply_updates(x, u)
    return _add(x, u, None if key is None else jax.random.fold_in(key, i))

  return treedef.unflatten(
    [one(i, x, u) for i, (x, u) in enumerate(zip(flat, changes, strict=True))]
  )


def _check_updates(params: Any, updates: Any) -> None:
  """Raises if an update does not fit its quantized weight."""
  given = paths.leaves_by_path(updates)
  paths.check_arrays(
    given,
    "Updates are arrays: take the gradient at `dequantize_params(params)`, and "
    "give the optimizer's `update` that and its result.",
  )
  for path, x in paths.leaves_by_path(params).items():
    u = given.get(path)
    if qarray.is_quantized(x) and u is not None and jnp.shape(u) != x.shape:
      raise ValueError(
        f"The update of the leaf {path!r} is {jnp.shape(u)}, but its weight is "
        f"{x.shape}."
      )


def _check_rules(rules: Any, params: Any) -> None:
  """Raises unless each rule is a regular expression that matches a matrix."""
  if isinstance(rules, str) or not all(isinstance(x, str) for x in rules):
    raise TypeError(
      '`rules` must be regular expressions such as ("kernel$",), got '
      f"{rules!r}."
    )
  leaves = paths.leaves_by_path(params)
  names = [name for name, x in leaves.items() if len(jnp.shape(x)) > 1]
  for rule in rules:
    try:
      matches = any(re.search(rule, name) for name in names)
    except re.error as error:
      raise ValueError(
        f"The rule {rule!r} in `rules` is not a regular expression: {error}."
      ) from error
    if not matches:
      raise ValueError(
        f"The rule {rule!r} in `rules` matches no leaf of two axes or more; "
        f"the leaves of two axes or more are {', '.join(names[:8]) or 'none'}."
      )


def _quantize(x: jax.Array, kind: str) -> qarray.QArray:
  if not sharding.is_explicit(x):
    return qarray.quantize(x, kind)
  like = sharding.shard_quantized_like(
    qarray.zeros(jnp.shape(x), kind), x, lambda spec: spec
  )
  return sharding.run_auto(lambda x: qarray.quantize(x, kind), like, x)


def _dequantize(q: qarray.QArray, dtype: Any) -> jax.Array:
  return sharding.run_auto(lambda q: qarray.dequantize(q, dtype), q.codes, q)


def _add(
  x: qarray.QArray, u: jax.Array, key: jax.Array | None
) -> qarray.QArray:
  return sharding.run_auto(_round_sum, x, x, u, key)


def _round_sum(
  x: qarray.QArray, u: jax.Array, key: jax.Array | None
) -> qarray.QArray:
  """The sum, computed for one matrix of a stack after another.

  Otherwise the sums of all matrices would be in memory in float32, and those of
  several leaves at once. On a mesh the matrices are on different devices.
  """
  if u.ndim < 3:
    return _round_matrix(x, u, key)
  keys = None if key is None else jax.random.split(key, len(u))
  if sharding.on_mesh(u):
    return jax.vmap(_round_sum)(x, u, keys)
  x, u, keys = sharding.vary_together((x, u, keys))

  def one(k: jax.Array, x: qarray.QArray) -> qarray.QArray:
    take = lambda tree: jax.tree.map(lambda y: slices.take(y, k), tree)
    # Computed before it is put back, which is then in place.
    new = jax.lax.optimization_barrier(_round_sum(take(x), take(u), take(keys)))
    return jax.tree.map(lambda y, z: slices.put(y, z, k), x, new)

  return jax.lax.fori_loop(0, len(u), one, x)


def _round_matrix(
  x: qarray.QArray, u: jax.Array, key: jax.Array | None
) -> qarray.QArray:
  total = qarray.dequantize(x) + u.astype(jnp.float32)
  key = key if qarray.rounds_at_random(x.kind) else None
  new = qarray.requantize_on_grid(x, total, key)
  return qarray.where_blocks(qarray.any_in_block(x, u != 0), new, x)
