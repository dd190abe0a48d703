"""Adds factors of low rank to weights, or replaces weights by them."""

import dataclasses
import re
import warnings
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_optax import flax_dicts, linalg
from galore_optax.baselines import factors
from galore_optax.baselines import restart as restart_lib
from galore_optax.quantization import blocks, qarray
from galore_optax.tree import boxes, matrix_view, paths, sharding, split
from galore_optax.tree import plan as plan_lib

# Elements of a frozen 4-bit weight that share a scale, as in QLoRA.
_BLOCK = 64


@flax_dicts.serializable("a", lambda adapter: adapter.dtype)
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
  r"""Two factors whose product is added to a weight, or is the weight.

  In JAX the weight W of a layer x ↦ x W has shape (in, out); its change is
  s · a b. The papers write Wᵀ, of shape (out, in): their A is aᵀ, and their B
  is bᵀ.

  Attributes:
    a: Left factor (..., m, r).
    b: Right factor (..., r, n); initially zero if the product is added to a
      weight.
    view: How the weight is read as matrices (..., m, n).
    scale: The factor s = α / r.
    dtype: Name of the weight's dtype.
  """

  a: Any
  b: Any
  view: matrix_view.MatrixView = dataclasses.field(metadata={"static": True})
  scale: float = dataclasses.field(metadata={"static": True})
  dtype: str = dataclasses.field(metadata={"static": True})

  def __post_init__(self):
    """Makes the class known to Flax, which may have been imported since."""
    flax_dicts.register()

  def change(self) -> jax.Array:
    """The product s · a b in the shape of the weight, at least float32."""
    product = linalg.matmul("...mr,...rn->...mn", self.a, self.b)
    return self.view.from_stack(self.scale * product)


def is_adapter(x: Any) -> bool:
  """Whether a node is an :class:`Adapter`."""
  return isinstance(x, Adapter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank:
  """A method that trains factors: splits parameters, and merges them again.

  Made by :func:`lora`, :func:`qlora`, :func:`relora` and :func:`low_rank`.
  The object is static and holds no arrays; all its methods can be jitted.

  Attributes:
    plan: Which leaves have factors, and of which rank.
    alpha: The factor on the product is alpha / rank; None for 1.
    full: Regular expressions. Leaves without factors in whose path one of them
      is found are trained at full rank; all others are frozen.
    frozen: How weights that have factors are stored: `full`, unchanged; `nf4`
      and `nf4_double`, in four bits; `none`, not at all.
    start: How factors without a weight beside them start, see
      :func:`low_rank`.
    dtype: Dtype of the factors; None for that of the weight.
    pruning: Which moments are set to zero at a restart, see :func:`relora`.
    pruned: The share of moments that is set to zero.
  """

  plan: plan_lib.Plan
  alpha: float | None = None
  full: tuple[str, ...] = ()
  frozen: str = "full"
  start: str = "spectral"
  dtype: Any = None
  pruning: str = "magnitude"
  pruned: float = 0.9

  def init(self, key: jax.Array, params: optax.Params) -> tuple[Any, dict]:
    """Splits parameters into a frozen part and the adapters to train.

    Before training, :meth:`apply` returns the same parameters, except for the
    rounding of 4-bit weights and, where factors replace a weight, for what a
    product of rank r cannot represent.

    Args:
      key: Random key for the factors.
      params: Parameters; any pytree.

    Returns:
      The frozen part, which is the parameters with `optax.MaskedNode()` in
      place of what is trained. And the adapters, for an optimizer: path to
      :class:`galore_optax.baselines.Adapter`, or to the leaf itself where it
      is trained at full rank.

    Raises:
      ValueError: If a rule matches no leaf, or does not fit the leaf.
      TypeError: If a leaf is not of floating point.
    """
    leaves = paths.leaves_by_path(params)
    sites = self._sites(leaves, boxes.axis_names(params))
    self._check_full(leaves)
    adapters = {
      path: self._adapter(_fold(key, path), leaf, sites[path])
      if path in sites
      else leaf
      for path, leaf in leaves.items()
      if path in sites or self._is_full(path)
    }
    freeze = lambda path, x: self._freeze(x, path in sites, path in adapters)
    return paths.map_with_path(freeze, params), adapters

  def apply(
    self, frozen: Any, adapters: dict[str, Any], dtype: Any = None
  ) -> optax.Params:
    """The parameters for the model, to be computed inside of the loss.

    Args:
      frozen: The frozen part that :meth:`init` returned.
      adapters: The adapters that :meth:`init` returned, and trained since.
      dtype: Dtype of the weights that have factors; None for their own.

    Returns:
      Parameters in the structure of the original ones. The sum of a weight and
      its change is computed in float32 and rounded to `dtype`. In bfloat16,
      rounding removes changes of less than a 256th of the weight.

    Raises:
      ValueError: If frozen part and adapters do not belong together.
    """
    flat, treedef = paths.flatten(frozen, split.is_masked)
    names = paths.paths([keys for keys, _ in flat])
    missing = set(adapters) - set(names)
    if missing:
      raise ValueError(
        f"The adapters have {min(missing)!r}, but there is no leaf "
        f"{min(missing)!r} in the frozen part. Pass the frozen part and the "
        "adapters that one call of `init` returned."
      )
    return treedef.unflatten(
      [
        _weight(name, x, adapters.get(name), dtype)
        for name, (_, x) in zip(names, flat, strict=True)
      ]
    )

  def merge(self, frozen: Any, adapters: dict[str, Any]) -> optax.Params:
    """The trained parameters, in the structure and dtypes of the original.

    Args:
      frozen: As for :meth:`apply`.
      adapters: As for :meth:`apply`.

    Returns:
      Parameters that need no adapters.
    """
    return self.apply(frozen, adapters)

  def restart(
    self, key: jax.Array, frozen: Any, adapters: dict[str, Any], opt_state: Any
  ) -> tuple[Any, dict, Any]:
    r"""Adds the products to the weights, and initializes the factors again.

    .. math::

      W_0 \leftarrow W_0 + s\,a b, \quad a \sim U(\pm 1/\sqrt m), \quad b = 0

    The parameters do not change, except for rounding where they are narrower
    than float32. Most moments of factors are set to zero; those of leaves that
    are trained at full rank are unchanged, and so are counters.

    Args:
      key: Random key, a different one for each restart.
      frozen: The frozen part that :meth:`init` or the last restart returned.
      adapters: The adapters that were returned with it, and trained since.
      opt_state: State of the optimizer of the adapters. Its moments are where
        an adapter would be an :class:`galore_optax.baselines.Adapter`.

    Returns:
      Frozen part, adapters and state, in the structures and dtypes they had.

    Raises:
      ValueError: If the weights are not stored in full.

    References:
      Lialin et al., `ReLoRA <https://arxiv.org/abs/2307.05695>`_, 2023,
      section 3.
    """
    if self.frozen != "full":
      raise ValueError(
        "A restart adds to weights that are kept in full, but here "
        f"frozen={self.frozen!r}. Use `relora` or `lora`."
      )
    params = self.apply(frozen, adapters)
    leaves = paths.leaves_by_path(params)
    fresh = {
      path: self._reset(_fold(key, path), leaves[path], x)
      if is_adapter(x)
      else x
      for path, x in adapters.items()
    }
    trained = {path for path, x in adapters.items() if not is_adapter(x)}
    merged = paths.map_with_path(
      lambda path, x: optax.MaskedNode() if path in trained else x, params
    )
    factors = {p: x for p, x in adapters.items() if is_adapter(x)}
    state = restart_lib.prune_moments(
      _fold(key, ""),
      opt_state,
      is_adapter,
      self.pruning,
      self.pruned,
      projected=paths.leaves_by_path(factors),
    )
    return merged, fresh, state

  def _sites(
    self, leaves: dict[str, Any], axis_names: dict[str, tuple]
  ) -> dict[str, plan_lib.Site]:
    """The leaves that get factors: those with a rule or with small factors.

    Raises:
      ValueError: If there are none.
    """
    with plan_lib.recording_decisions() as made, warnings.catch_warnings():
      warnings.filterwarnings("ignore", "galore projects none")
      matrices = self.plan.sites(leaves, axis_names=axis_names)

    def has_rule(path: str) -> bool:
      return any(re.search(pattern, path) for pattern, _ in self.plan.rules)

    def saves_memory(site: plan_lib.Site) -> bool:
      m, n = site.matrix.dims
      return site.rank * (m + n) < m * n

    sites = {
      path: site
      for path, site in matrices.items()
      if has_rule(path) or saves_memory(site)
    }
    if not sites:
      large = dict.fromkeys(matrices, "`rank` too large to save memory")
      reasons = {path: x.reason for path, x in made.items()} | large
      listed = ", ".join(f"{path} ({why})" for path, why in reasons.items())
      raise ValueError(
        f"No leaf gets factors: {listed or 'there are no leaves'}. Lower "
        "`rank`, or name leaves in `rules`."
      )
    return sites

  def _is_full(self, path: str) -> bool:
    return any(re.search(pattern, path) for pattern in self.full)

  def _check_full(self, leaves: dict[str, Any]) -> None:
    for pattern in self.full:
      if not any(re.search(pattern, path) for path in leaves):
        raise ValueError(
          f"The pattern {pattern!r} in `full` matches no leaf. The leaves are "
          f"{', '.join(leaves)}."
        )

  def _freeze(self, x: Any, has_factors: bool, is_trained: bool) -> Any:
    """A leaf as the frozen part stores it."""
    if not has_factors:
      return optax.MaskedNode() if is_trained else x
    if self.frozen == "none":
      return optax.MaskedNode()
    if self.frozen == "full":
      return x
    return quantize_weight(x, double=self.frozen == "nf4_double")

  def _adapter(self, key: jax.Array, leaf: Any, site: plan_lib.Site) -> Adapter:
    """The initial factors of a leaf."""
    dtype = self.dtype or jnp.result_type(leaf)
    view, rank = site.matrix, site.rank
    scale = 1.0 if self.alpha is None else float(self.alpha) / rank

    def make(key: jax.Array, leaf: jax.Array) -> factors.Pair:
      if self.frozen != "none":
        a, b = factors.zero_product(key, view, rank)
      else:
        matrices = view.as_stack(leaf)
        a, b = factors.approximation(key, matrices, rank, self.start)
      return a.astype(dtype), b.astype(dtype)

    a, b = factors.sharded_like_weight(make, view, rank, dtype, key, leaf)
    return Adapter(a, b, view, scale, jnp.result_type(leaf).name)

  def _reset(self, key: jax.Array, leaf: Any, old: Adapter) -> Adapter:
    """An adapter with new initial factors."""
    view, rank, dtype = old.view, old.a.shape[-1], old.a.dtype

    def make(key: jax.Array, leaf: jax.Array) -> factors.Pair:
      del leaf
      a, b = factors.zero_product(key, view, rank)
      return a.astype(dtype), b.astype(dtype)

    a, b = factors.sharded_like_weight(make, view, rank, dtype, key, leaf)
    return dataclasses.replace(old, a=a, b=b)


def quantize_weight(x: jax.Array, double: bool) -> qarray.QArray:
  """A frozen weight in four bits, as in QLoRA.

  64 elements share a scale. In float32 the scales take 0.5 bits an element, and
  0.127 bits if they are quantized themselves, to 8-bit dynamic codes. (The
  paper subtracts the mean of the scales and uses a signed code; the unsigned
  code needs no mean.)

  Args:
    x: The weight.
    double: Whether scales are quantized, too.

  Returns:
    The quantized weight, sharded like `x`. With `double`, its scales are a
    :class:`galore_optax.QArray`, and it can be read and sliced, but not
    updated.
  """
  q = _quantize(x, "nf4", _BLOCK)
  if not double:
    return q
  scale = _quantize(q.scale, "unsigned_dynamic", blocks.BLOCK)
  return dataclasses.replace(q, scale=scale)


def _quantize(x: jax.Array, kind: str, block: int) -> qarray.QArray:
  run = lambda x: qarray.quantize(x, kind, block=block)
  if not sharding.is_explicit(x):
    return run(x)
  empty = qarray.zeros(jnp.shape(x), kind, block=block)
  like = sharding.shard_quantized_like(empty, x, lambda spec: spec)
  return sharding.run_auto(run, like, x)


def _fold(key: jax.Array, path: str) -> jax.Array:
  """A random key for one leaf, which does not depend on the other leaves."""
  return jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))


def _weight(name: str, x: Any, adapter: Any, dtype: Any) -> Any:
  """A leaf for the model, from its frozen part and its adapter."""
  if adapter is None:
    if split.is_masked(x):
      raise ValueError(
        f"The leaf {name!r} is neither in the frozen part nor among the "
        "adapters. Pass the frozen part and the adapters that one call of "
        "`init` returned."
      )
    return x
  if not is_adapter(adapter):
    return adapter
  dtype = dtype or adapter.dtype
  if split.is_masked(x):
    return adapter.change().astype(dtype)
  if qarray.is_quantized(x):
    x = sharding.run_auto(qarray.dequantize, x.codes, x)
  wide = jnp.promote_types(x.dtype, jnp.float32)
  return (x.astype(wide) + adapter.change()).astype(dtype)
