"""Weights with factors of low rank beside them, or in place of them."""

import dataclasses
import re
import warnings
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_optax.baselines import restart as restart_lib
from galore_optax.quantization import qarray
from galore_optax.subspace import find as find_lib
from galore_optax.subspace import projection
from galore_optax.tree import matrix_view, paths, sharding, split
from galore_optax.tree import plan as plan_lib

# Elements of a frozen 4-bit weight that share a scale, as in QLoRA.
BLOCK = 64

STARTS = ("spectral", "random")

# Steps of subspace iteration in which a spectral start is found.
_ITERATIONS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
  r"""Two factors whose product is added to a weight, or is the weight.

  The weight of a layer x ↦ x W, as JAX keeps it, is of shape (in, out), and
  changes by s · a b. The papers write Wᵀ, of shape (out, in): their A is aᵀ,
  their B is bᵀ.

  Attributes:
    a: Left factor (..., m, r).
    b: Right factor (..., r, n); zero at first, where it is added to a weight.
    view: How the weight is read as matrices (..., m, n).
    scale: The factor s = α / r.
    dtype: Name of the weight's dtype.
  """

  a: Any
  b: Any
  view: matrix_view.MatrixView = dataclasses.field(metadata={"static": True})
  scale: float = dataclasses.field(metadata={"static": True})
  dtype: str = dataclasses.field(metadata={"static": True})

  def change(self) -> jax.Array:
    """The product s · a b in the shape of the weight, at least float32."""
    product = jnp.einsum(
      "...mr,...rn->...mn",
      self.a,
      self.b,
      precision=jax.lax.Precision.HIGHEST,
      preferred_element_type=jnp.promote_types(self.a.dtype, jnp.float32),
    )
    return self.view.from_matrix(self.scale * product)


def is_adapter(x: Any) -> bool:
  """Whether a node is an :class:`Adapter`."""
  return isinstance(x, Adapter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank:
  """How parameters are divided in frozen and trained ones, and put together.

  Made by :func:`lora`, :func:`qlora`, :func:`relora` and :func:`low_rank`.
  The object is static, it holds no arrays; all its methods can be jitted.

  Attributes:
    plan: Which leaves have factors, and of which rank.
    alpha: The factor on the product is alpha / rank; None for 1.
    full: Regular expressions; leaves without factors in whose path one of
      them is found are trained as they are, all others are frozen.
    frozen: What becomes of weights that have factors: `full`, kept; `nf4` and
      `nf4_double`, kept in four bits; `none`, given up.
    start: How factors start that have no weight beside them, see
      :func:`low_rank`.
    dtype: Dtype of the factors; None for that of the weight.
    pruning: How moments are thinned out at a restart, see :func:`relora`.
    pruned: The share of them that is set to zero.
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
    """Divides parameters; right after, `apply` gives them back.

    That is so but for the rounding of 4-bit weights, and for what a product
    of rank r cannot hold where it stands for the whole weight.

    Args:
      key: Random key for the factors.
      params: Parameters; any pytree.

    Returns:
      The frozen part: the parameters, with `optax.MaskedNode()` in place of
      what is trained. And the adapters, for an optimizer: path to
      :class:`galore_optax.baselines.Adapter`, or to the leaf itself where it is
      trained as it is.

    Raises:
      ValueError: If a rule matches no leaf, or does not fit the leaf.
      TypeError: If a leaf is not of floating point.
    """
    leaves = paths.leaves_by_path(params)
    sites = self._sites(leaves)
    self._check_full(leaves)
    adapters = {
      path: self._adapter(_fold(key, path), leaf, sites[path])
      if path in sites
      else leaf
      for path, leaf in leaves.items()
      if path in sites or self._is_full(path)
    }
    keep = lambda path, x: self._kept(x, path in sites, path in adapters)
    return paths.map_with_path(keep, params), adapters

  def apply(
    self, frozen: Any, adapters: dict[str, Any], dtype: Any = None
  ) -> optax.Params:
    """The parameters that a model computes with: inside of the loss.

    Args:
      frozen: What :meth:`init` has returned.
      adapters: Likewise, and trained since.
      dtype: Dtype of the weights that have factors; None for their own.

    Returns:
      Parameters in the structure of those that were divided. The sum of a
      weight and its change is made in float32 and rounded to `dtype`: to
      bfloat16, which changes of less than a 256th of a weight do not reach.

    Raises:
      ValueError: If frozen part and adapters do not belong together.
    """
    flat, treedef = paths.flatten(frozen, split.is_masked)
    names = paths.paths([keys for keys, _ in flat])
    missing = set(adapters) - set(names)
    if missing:
      raise ValueError(
        f"There is no leaf {min(missing)!r} in the frozen part, which an "
        "adapter is for. Pass the two that `init` has returned together."
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
      frozen: What :meth:`init` has returned.
      adapters: Likewise, and trained since.

    Returns:
      Parameters for which the model computes what it was trained to.
    """
    return self.apply(frozen, adapters)

  def restart(
    self, key: jax.Array, frozen: Any, adapters: dict[str, Any], opt_state: Any
  ) -> tuple[Any, dict, Any]:
    r"""Adds the products to the weights and starts the factors anew.

    .. math::

      W_0 \leftarrow W_0 + s\,a b, \quad a \sim U(\pm 1/\sqrt m), \quad b = 0

    The parameters stay what they are, but for rounding where they are kept in
    less than float32. The moments of factors are thinned out; what is trained
    as it is keeps its own, and so do counters.

    Args:
      key: Random key, another one for each restart.
      frozen: What :meth:`init` or a restart has returned.
      adapters: Likewise, and trained since.
      opt_state: State of the optimizer of the adapters. Moments are what is
        in it in place of an :class:`galore_optax.baselines.Adapter`.

    Returns:
      The three, in the structures and dtypes that they had.

    Raises:
      ValueError: If there are no weights to add to.

    References:
      Lialin et al., `ReLoRA <https://arxiv.org/abs/2307.05695>`_, 2023,
      section 3.
    """
    if self.frozen != "full":
      raise ValueError(
        "Only weights that are kept in full can be merged into, not "
        f"`frozen={self.frozen!r}`: use `relora` or `lora`."
      )
    whole = self.apply(frozen, adapters)
    leaves = paths.leaves_by_path(whole)
    fresh = {
      path: self._renewed(_fold(key, path), leaves[path], x)
      if is_adapter(x)
      else x
      for path, x in adapters.items()
    }
    trained = {path for path, x in adapters.items() if not is_adapter(x)}
    merged = paths.map_with_path(
      lambda path, x: optax.MaskedNode() if path in trained else x, whole
    )
    how = (self.pruning, self.pruned)
    state = restart_lib.thin_out(_fold(key, ""), opt_state, is_adapter, *how)
    return merged, fresh, state

  def _sites(self, leaves: dict[str, Any]) -> dict[str, plan_lib.Site]:
    """The leaves that get factors: by a rule, or if they become smaller.

    Raises:
      ValueError: There is none.
    """
    named = lambda path: any(re.search(p, path) for p, _ in self.plan.rules)
    with plan_lib.noting_reasons() as reasons, warnings.catch_warnings():
      warnings.filterwarnings("ignore", "galore projects none")
      found = self.plan.sites(leaves)
    sites = {
      path: site
      for path, site in found.items()
      if named(path)
      or site.rank * (site.view.m + site.view.n) < site.view.m * site.view.n
    }
    if not sites:
      large = dict.fromkeys(found, "`rank` too large to save anything")
      told = ", ".join(
        f"{p} ({why})" for p, why in {**reasons, **large}.items()
      )
      raise ValueError(
        f"No leaf gets factors: {told or 'there is none'}. Lower `rank`, or "
        "name leaves in `rules`."
      )
    return sites

  def _is_full(self, path: str) -> bool:
    return any(re.search(pattern, path) for pattern in self.full)

  def _check_full(self, leaves: dict[str, Any]) -> None:
    for pattern in self.full:
      if not any(re.search(pattern, path) for path in leaves):
        raise ValueError(
          f"The pattern {pattern!r} in `full` matches no leaf; they are "
          f"{', '.join(leaves)}."
        )

  def _kept(self, x: Any, has_factors: bool, is_trained: bool) -> Any:
    """A leaf of the frozen part."""
    if not has_factors:
      return optax.MaskedNode() if is_trained else x
    if self.frozen == "none":
      return optax.MaskedNode()
    if self.frozen == "full":
      return x
    q = _quantize(x, "nf4", BLOCK)
    if self.frozen == "nf4":
      return q
    return dataclasses.replace(
      q, scale=_quantize(q.scale, "unsigned_dynamic", qarray.BLOCK)
    )

  def _adapter(self, key: jax.Array, leaf: Any, site: plan_lib.Site) -> Adapter:
    """The factors of a leaf, as they start."""
    dtype = self.dtype or jnp.result_type(leaf)
    view, rank = site.view, site.rank
    scale = 1.0 if self.alpha is None else float(self.alpha) / rank

    def draw(key: jax.Array, leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
      if self.frozen != "none":
        a, b = _uniform(key, view, rank), jnp.zeros((*view.stack, rank, view.n))
      else:
        a, b = _factors(key, view.as_matrix(leaf), rank, self.start)
      return a.astype(dtype), b.astype(dtype)

    a, b = _placed(draw, view, rank, dtype, key, leaf)
    return Adapter(a, b, view, scale, jnp.result_type(leaf).name)

  def _renewed(self, key: jax.Array, leaf: Any, old: Adapter) -> Adapter:
    view, rank, dtype = old.view, old.a.shape[-1], old.a.dtype

    def draw(key: jax.Array, leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
      del leaf
      zeros = jnp.zeros(old.b.shape, dtype)
      return _uniform(key, view, rank).astype(dtype), zeros

    a, b = _placed(draw, view, rank, dtype, key, leaf)
    return dataclasses.replace(old, a=a, b=b)


def _fold(key: jax.Array, path: str) -> jax.Array:
  """A leaf's own key, whatever other leaves there are."""
  return jax.random.fold_in(key, np.uint32(zlib.crc32(path.encode())))


def _uniform(
  key: jax.Array, view: matrix_view.MatrixView, rank: int
) -> jax.Array:
  """Kaiming's start as public codes have it: uniform in ±1/√m."""
  bound = view.m**-0.5
  shape = (*view.stack, view.m, rank)
  return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _factors(
  key: jax.Array, x: jax.Array, rank: int, start: str
) -> tuple[jax.Array, jax.Array]:
  """Factors (..., m, r) and (..., r, n) that stand for matrices."""
  *stack, m, n = x.shape
  x = x.astype(jnp.float32).reshape(-1, m, n)
  if start == "random":
    # Entries of the product are as large as those of the matrix. Of zeros one
    # factor is zero: were both, neither would have a gradient.
    square = jnp.mean(x * x, axis=(-2, -1), keepdims=True)
    deviation = (square / rank) ** 0.25
    left, right = jax.random.split(key)
    a = jnp.where(square > 0, deviation, m**-0.5)
    a *= jax.random.normal(left, (len(x), m, rank))
    b = deviation * jax.random.normal(right, (len(x), rank, n))
  else:
    # One after the other: batches of factorisations can hang on CPU.
    basis = find_lib.start_basis(key, m, rank)
    find = lambda g: find_lib.find_basis(
      g, basis, "left", "subspace", jnp.int32(_ITERATIONS)
    )
    a = jax.lax.map(find, x)
    b = projection.project(x, {"left": a})
    # Both factors of one size, so that they learn at one rate. Of zeros one is
    # zero: were both, neither would have a gradient.
    size = lambda y: jnp.linalg.norm(y, axis=(-2, -1), keepdims=True)
    balance = jnp.sqrt(size(b) / size(a))
    balance = jnp.where(balance > 0, balance, 1)
    a, b = a * balance, b / balance
  return a.reshape(*stack, m, rank), b.reshape(*stack, rank, n)


def _placed(
  draw: Any,
  view: matrix_view.MatrixView,
  rank: int,
  dtype: Any,
  key: jax.Array,
  leaf: Any,
) -> tuple[jax.Array, jax.Array]:
  """Runs `draw` and puts the factors where the weight is."""
  left = lambda spec: (*view.spec(spec)[:-1], None)
  right = lambda spec: (*view.spec(spec)[:-2], None, view.spec(spec)[-1])
  put = lambda a, b: (
    sharding.place(a, leaf, left),
    sharding.place(b, leaf, right),
  )
  zeros = lambda m, n: jnp.zeros((*view.stack, m, n), dtype)
  if not sharding.is_explicit(leaf):
    return put(*draw(key, leaf))
  like = put(zeros(view.m, rank), zeros(rank, view.n))
  return sharding.run_auto(draw, like, key, leaf)


def _weight(name: str, x: Any, change: Any, dtype: Any) -> Any:
  """A leaf as the model reads it."""
  if change is None:
    if split.is_masked(x):
      raise ValueError(
        f"The leaf {name!r} is neither in the frozen part nor among the "
        "adapters. Pass the two that `init` has returned together."
      )
    return x
  if not is_adapter(change):
    return change
  dtype = dtype or change.dtype
  if split.is_masked(x):
    return change.change().astype(dtype)
  if qarray.is_quantized(x):
    x = sharding.run_auto(qarray.dequantize, x.codes, x)
  wide = jnp.promote_types(x.dtype, jnp.float32)
  return (x.astype(wide) + change.change()).astype(dtype)


def _quantize(x: jax.Array, kind: str, block: int) -> qarray.QArray:
  run = lambda x: qarray.quantize(x, kind, block=block)
  if not sharding.is_explicit(x):
    return run(x)
  empty = qarray.zeros(jnp.shape(x), kind, block=block)
  like = sharding.place_quantized(empty, x, lambda spec: spec)
  return sharding.run_auto(run, like, x)
