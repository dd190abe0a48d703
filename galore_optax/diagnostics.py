"""Reports the memory of a state, what is projected, and how good bases are."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax import linalg
from galore_optax.quantization import qarray
from galore_optax.subspace import projection
from galore_optax.transform import axis_names
from galore_optax.transform.state import GaLoreState
from galore_optax.tree import paths, plan, sides


def state_bytes(state: Any) -> int:
  """Number of bytes of the arrays in a state.

  Args:
    state: Any pytree of arrays, or of their `jax.ShapeDtypeStruct`.

  Returns:
    Number of bytes; sub-byte integers count as packed.

  Example:
    >>> import optax
    >>> params = {"w": jnp.zeros((512, 1376))}
    >>> state_bytes(optax.adam(1e-3).init(params))
    5636100
  """
  return sum(_leaf_bytes(x) for x in jax.tree.leaves(state))


def _leaf_bytes(x: Any) -> int:
  dtype = jnp.result_type(x)
  bits = (
    jnp.iinfo(dtype).bits
    if jnp.issubdtype(dtype, jnp.integer)
    else 8 * dtype.itemsize
  )
  return math.ceil(math.prod(jnp.shape(x)) * bits / 8)


def find_bases(state: Any) -> dict[str, dict[str, jax.Array]]:
  """The bases in an optimizer's state, as arrays.

  Args:
    state: State of any optimizer, with or without GaLore anywhere in it.

  Returns:
    Path of a projected leaf to side (`left`, `right`; of a tensor `axis0`,
    `axis1`, ...) to its basis, (..., m, r) or (..., n, r), dequantized if it is
    stored quantized. A random projection of which only the seed is stored is
    drawn. It is not orthonormal, so that its captured energy and overlap mean
    nothing.

  Example:
    >>> import optax
    >>> from galore_optax import find_bases, galore
    >>> params = {"mlp": jnp.zeros((8, 512, 1376)), "norm": jnp.zeros((8, 512))}
    >>> state = galore(optax.adam(1e-3), rank=4).init(params)
    >>> {path: sorted(sides) for path, sides in find_bases(state).items()}
    {'mlp': ['left']}
  """
  return {
    path: projection.read_stacked(stored)
    for x in _states(state)
    for path, stored in x.projector.items()
  }


def refresh_counts(state: Any) -> dict[str, jax.Array]:
  """How often each matrix has been refreshed under the adaptive policy.

  Args:
    state: State of any optimizer, with or without GaLore anywhere in it.

  Returns:
    Path of a projected leaf to the number of refreshes so far, int32 of the
    shape of the axes that stack its matrices. Empty for other policies, for
    which the step and the gap determine the number.

  Example:
    >>> import optax
    >>> from galore_optax import q_galore_adamw_8bit, refresh_counts
    >>> params = {"mlp": jnp.zeros((3, 64, 96)), "norm": jnp.zeros((3, 64))}
    >>> tx = q_galore_adamw_8bit(1e-3, rank=4)
    >>> grads = jax.tree.map(jnp.ones_like, params)
    >>> _, state = tx.update(grads, tx.init(params), params)
    >>> {path: x.tolist() for path, x in refresh_counts(state).items()}
    {'mlp': [1, 1, 1]}
  """
  return {
    path: schedule.refreshes
    for x in _states(state)
    for path, schedule in (x.schedule or {}).items()
  }


def stable_rank(g: jax.Array) -> jax.Array:
  r"""The stable rank of matrices, :math:`\|G\|_F^2 / \|G\|_2^2`.

  It says how many directions have most of a matrix's energy. It is between 1,
  for rank one, and the shorter side, for equal singular values. The spectral
  norm is computed by power iteration, which needs no factorization.

  Args:
    g: Matrices (..., m, n).

  Returns:
    float32 of shape (...), 0 where the matrix is zero.

  Example:
    >>> print(stable_rank(jnp.diag(jnp.array([2.0, 1.0, 1.0]))))
    1.5
  """
  g = _normalized(g)
  start = jax.random.normal(jax.random.key(0), (g.shape[-1],), g.dtype)
  vector = jnp.broadcast_to(start, (*g.shape[:-2], g.shape[-1]))

  def iterate(_, vector):
    image = linalg.matmul("...mn,...n->...m", g, vector)
    vector = linalg.matmul("...mn,...m->...n", g, image)
    norm = jnp.linalg.norm(vector, axis=-1, keepdims=True)
    return vector / jnp.where(norm > 0, norm, 1)

  vector = jax.lax.fori_loop(0, _POWER_ITERATIONS, iterate, vector)
  image = linalg.matmul("...mn,...n->...m", g, vector)
  return _ratio(_energy(g), jnp.sum(image * image, axis=-1))


def captured_energy(g: jax.Array, bases: Mapping[str, jax.Array]) -> jax.Array:
  r"""Share of a gradient's energy that is in the span of its bases.

  It is :math:`\|P^\top G\|_F^2 / \|G\|_F^2`, or with :math:`P^\top G Q` instead
  for a two-sided projection, and with the core for a tensor.

  Args:
    g: Gradients (..., m, n); of tensors, with the axes that count them first.
    bases: `left` (..., m, r), `right` (..., n, r), or both, as a
      :class:`galore_optax.GaLoreState` holds them for a path.

  Returns:
    float32 of shape (...), from 0 to 1; 0 where the gradient is zero.

  Example:
    >>> bases = {"left": jnp.eye(3)[:, :1]}
    >>> print(captured_energy(jnp.diag(jnp.array([2.0, 1.0, 1.0])), bases))
    0.6666667
  """
  arrays = projection.read(bases)
  ndim = 2
  if any(map(sides.is_tensor_side, arrays)):
    ndim = projection.tensor_ndim(g, next(iter(arrays.values())))
  g = _normalized(g, ndim)
  low = projection.project(g, arrays)
  # The columns of quantized bases do not have length one exactly.
  return jnp.minimum(_ratio(_energy(low, ndim), _energy(g, ndim)), 1)


def basis_overlap(
  new: Mapping[str, jax.Array], old: Mapping[str, jax.Array]
) -> jax.Array:
  r"""Overlap of two subspaces, :math:`\|P_{new}^\top P_{old}\|_F^2 / r`.

  It is the mean squared cosine of the principal angles between them: 1 for
  equal subspaces, r / m in expectation for two random ones. For a two-sided
  projection it is that of the side that overlaps less.

  Args:
    new: Bases, as a :class:`galore_optax.GaLoreState` holds them for a path.
    old: Others of the same shapes.

  Returns:
    float32 of the shape of the stack axes.

  Example:
    >>> old, new = jnp.eye(4)[:, :2], jnp.eye(4)[:, 1:3]
    >>> print(basis_overlap({"left": new}, {"left": old}))
    0.5
  """
  shares = [
    _energy(overlap) / overlap.shape[-1]
    for overlap in projection.overlap(
      projection.read(new), projection.read(old)
    ).values()
  ]
  return jnp.minimum(jnp.min(jnp.stack(shares), axis=0), 1)


_POWER_ITERATIONS = 64


def _normalized(g: jax.Array, ndim: int = 2) -> jax.Array:
  """Matrices in float32 with entries up to 1, whose squares stay in range.

  Args:
    g: Matrices, or tensors.
    ndim: Number of axes of one.
  """
  g = g.astype(jnp.float32)
  largest = jnp.max(jnp.abs(g), axis=range(-ndim, 0), keepdims=True)
  return g / jnp.where(largest == 0, 1, largest)


def _energy(x: jax.Array, ndim: int = 2) -> jax.Array:
  return jnp.sum(x * x, axis=tuple(range(-ndim, 0)))


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


@dataclasses.dataclass(frozen=True)
class Row:
  """One leaf in a :class:`Description`.

  Attributes:
    path: The leaf's path.
    shape: Its shape.
    matrix: Its matrix view, such as `8 x (512, 1376)`, or an empty string. If a
      rule gives its axes factors, the shapes of a tensor and of its core, such
      as `8 x (3, 3, 64, 128), core (3, 3, 16, 32)`.
    side: `left`, `right`, `both`, or an empty string at full rank. Of a tensor
      the shape of each factor, such as `axis2 (64, 16), axis3 (128, 32)`.
    rank: The rank, or None at full rank. Of a tensor, one for each factor.
    state_bytes: Bytes of its bases and moments.
    adam_bytes: Bytes of its moments under `optax.adam`, which have the leaf's
      dtype.
    reason: Why GaLore leaves it at full rank: `its name` (an embedding, a head,
      a norm, a bias or a scale), `rule 'REGEX'`, `no matrix` (fewer than two
      axes), `thin` (one row or column), `no smaller at rank R`, `complex` or
      `empty`. If it is projected, `axis 'NAME'` where Flax's partition metadata
      say that an axis stacks layers; otherwise, and if GaLore does not see the
      leaf, an empty string.
    guessed: Whether the reason is guessed from the name of the leaf or of an
      axis. A rule for the leaf overrides it.
  """

  path: str
  shape: tuple[int, ...]
  matrix: str
  side: str
  rank: int | tuple[int, ...] | None
  state_bytes: int
  adam_bytes: int
  reason: str = ""
  guessed: bool = False


@dataclasses.dataclass(frozen=True, repr=False)
class Description:
  """What an optimizer projects, and the size of its state; prints as a table.

  Attributes:
    rows: One row a leaf.
    total_bytes: Bytes of the whole optimizer state, counters included.
  """

  rows: tuple[Row, ...]
  total_bytes: int

  def __str__(self) -> str:
    """The table."""
    head = ("leaf", "shape", "matrix", "side", "rank", "state", "Adam")
    has_reasons = any(row.reason for row in self.rows)
    head += ("because of",) if has_reasons else ()
    lines = [
      (
        row.path,
        str(row.shape),
        row.matrix or "-",
        row.side or "full rank",
        _listed(row.rank),
        f"{row.state_bytes:,}",
        f"{row.adam_bytes:,}",
        *((_because(row),) if has_reasons else ()),
      )
      for row in self.rows
    ]
    adam = sum(row.adam_bytes for row in self.rows)
    total = (
      "total bytes",
      "",
      "",
      "",
      "",
      f"{self.total_bytes:,}",
      f"{adam:,}",
      *(("",) if has_reasons else ()),
    )
    widths = [
      max(map(len, column)) for column in zip(head, *lines, total, strict=False)
    ]
    rule = tuple("-" * width for width in widths)
    text = []
    for line in (head, rule, *lines, rule, total):
      cells = [
        cell.rjust(width) if 4 <= i <= 6 else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(line, widths, strict=False))
      ]
      text.append("  ".join(cells).rstrip())
    return "\n".join(text)

  __repr__ = __str__


def _listed(rank: int | tuple[int, ...] | None) -> str:
  if isinstance(rank, tuple):
    return ", ".join(map(str, rank))
  return str(rank or "-")


def _because(row: Row) -> str:
  return f"{row.reason} (a guess)" if row.guessed else row.reason


def describe(
  tx: optax.GradientTransformation, params: optax.Params
) -> Description:
  """Lists, leaf by leaf, what an optimizer projects and the size of its state.

  Args:
    tx: Any optimizer, with or without GaLore anywhere in it.
    params: Parameters, or their `jax.ShapeDtypeStruct`. Nothing is allocated.
      Quantized parameters count as the float32 weights they stand for.

  Returns:
    A table to print, with the leaf, its shape, matrix view, projected side,
    rank, bytes of optimizer state, bytes under Adam, and why it is at full
    rank. A reason that was guessed from a name says so. A leaf that a wrapper
    divides, as `optax.contrib.split_real_and_imaginary` does, is one row.

  Raises:
    ValueError: If the optimizer does not fit the parameters.

  Example:
    >>> import optax
    >>> from galore_optax import describe, galore
    >>> params = {"mlp": jnp.zeros((8, 512, 1376)), "norm": jnp.zeros((8, 512))}
    >>> print(describe(galore(optax.adam(1e-3), rank=128), params))
    leaf         shape           matrix           side       rank       state        Adam  because of
    -----------  --------------  ---------------  ---------  ----  ----------  ----------  ------------------
    mlp          (8, 512, 1376)  8 x (512, 1376)  left        128  13,369,344  45,088,768
    norm         (8, 512)        -                full rank     -      32,768      32,768  its name (a guess)
    -----------  --------------  ---------------  ---------  ----  ----------  ----------  ------------------
    total bytes                                                    13,402,120  45,121,536
  """  # noqa: E501
  params = paths.map_with_path(lambda _, x: _dequantized_shape(x), params)
  leaves = paths.leaves_by_path(params)
  with plan.recording_decisions() as decisions:
    # A new function each time: a cached trace would record no decisions.
    state = jax.eval_shape(lambda x: tx.init(x), params)
  # Paths of GaLore's leaves, which a wrapper may have made from the parameters.
  owners = {path: path for path in leaves} | _owners(decisions, leaves)
  owned = dict.fromkeys(leaves, 0)
  for keys, x in jax.tree_util.tree_flatten_with_path(state)[0]:
    path = _owner(keys, owners)
    if path is not None:
      owned[path] += _leaf_bytes(x)
  bases: dict[str, Any] = {}
  for x in _states(state):
    bases |= x.projector
  parts: dict[str, dict[str, _Part]] = {path: {} for path in leaves}
  for path, decision in decisions.items():
    if path in owners:
      parts[owners[path]][path] = _Part(decision, bases.get(path))
  rows = tuple(
    _row(path, leaf, parts[path], owned[path]) for path, leaf in leaves.items()
  )
  return Description(rows, state_bytes(state))


def _dequantized_shape(x: Any) -> Any:
  """A leaf, or the shape of the weight that a quantized leaf stands for."""
  if not qarray.is_quantized(x):
    return x
  return jax.ShapeDtypeStruct(x.shape, jnp.float32)


def _states(state: Any) -> list[GaLoreState]:
  """The states of GaLore in an optimizer's state, with plain arrays."""
  is_state = lambda x: isinstance(x, GaLoreState)
  leaves = jax.tree.leaves(axis_names.without_names(state), is_leaf=is_state)
  return [x for x in leaves if is_state(x)]


def _owners(found: Iterable[str], leaves: Mapping[str, Any]) -> dict[str, str]:
  """Path in a tree that a wrapper made from the parameters to parameter.

  The wrapper may have put the parameters into another tree, as their path then
  shows, or other nodes in their place, such as the real and imaginary parts of
  complex ones. Paths that belong to no parameter, such as that of a vector of
  all parameters, are left out.
  """
  owners = {}
  for path in found:
    contained = [x for x in leaves if _contains(path, x)]
    containing = [x for x in leaves if _contains(x, path)]
    if contained:
      owners[path] = max(contained, key=len)
    elif len(containing) == 1:
      owners[path] = containing[0]
  return owners


def _contains(path: str, part: str) -> bool:
  """Whether the components of one path follow each other in another one."""
  return f"/{part}/" in f"/{path}/"


def _owner(keys: tuple, owners: Mapping[str, str]) -> str | None:
  """Path of the parameter that a leaf of the state belongs to, or None.

  The leaf's key path either contains the parameter's path as a key, or ends in
  the parameter's path and, where the leaf is a part of a moment such as codes,
  in the path of that part.
  """
  names = [getattr(key, "key", None) for key in keys]
  for name in names:
    if isinstance(name, str) and name in owners and "/" in name:
      return owners[name]
  for trimmed in range(_MOST_PARTS):
    for start in range(len(keys) - trimmed):
      path = paths.paths([keys[start : len(keys) - trimmed]])[0]
      if path in owners:
        return owners[path]
  return next((owners[name] for name in names if name in owners), None)


# Keys at the end of a leaf's key path in a state that are not the parameter's,
# at most: those of a part of a node, of an array in that, of a box.
_MOST_PARTS = 4


class _Part(NamedTuple):
  """What GaLore decided about a leaf, and its bases, if it has any."""

  decision: plan.Decision
  bases: Any


def _row(path: str, leaf: Any, parts: Mapping[str, _Part], owned: int) -> Row:
  """The row of a parameter, which a wrapper may have divided into parts."""
  shape = tuple(jnp.shape(leaf))
  adam = 2 * math.prod(shape) * jnp.result_type(leaf).itemsize
  projected = [x for x in parts.values() if x.bases and x.decision.site]
  other = next((x.decision for x in parts.values() if not x.bases), None)
  reason = other or (projected[0].decision if projected else None)
  why = (reason.reason, reason.guessed) if reason else ("", False)
  if not projected:
    return Row(path, shape, "", "", None, owned, adam, *why)
  stored = projected[0].bases
  rank: int | tuple[int, ...]
  if any(map(sides.is_tensor_side, stored)):
    shapes = {k: projection.basis_shape(x)[-2:] for k, x in stored.items()}
    side = ", ".join(f"{name} {x}" for name, x in shapes.items())
    rank = tuple(x[-1] for x in shapes.values())
  else:
    side = "both" if len(stored) == 2 else next(iter(stored))
    rank = projection.basis_shape(next(iter(stored.values())))[-1]
  matrix = _matrices(projected)
  return Row(path, shape, matrix, side, rank, owned, adam, *why)


def _matrices(parts: Sequence[_Part]) -> str:
  """The matrices of a parameter's parts, equal ones counted together."""
  counts: dict[str, int] = {}
  is_one = len(parts) == 1
  for part in parts:
    # The bases count them: layer by layer, GaLore has seen one layer's leaf.
    stack = projection.basis_shape(next(iter(part.bases.values())))[:-2]
    site: Any = part.decision.site
    text = str(site.view.dims)
    if site.is_tensor:
      text += f", core {site.low_shape[len(site.view.stack) :]}"
    counts[text] = counts.get(text, 0) + math.prod(stack)
    is_one &= not stack
  return ", ".join(
    text if is_one else f"{count} x {text}" for text, count in counts.items()
  )
