"""What a state costs, and what an optimizer projects."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import paths
from galore_optax.galore import GaLoreState


def state_bytes(state: Any) -> int:
  """Bytes that the arrays of a state take.

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


@dataclasses.dataclass(frozen=True)
class Row:
  """One leaf in a :class:`Description`.

  Attributes:
    path: The leaf's path.
    shape: Its shape.
    matrix: Its matrix view, such as `8 x (512, 1376)`, or an empty string.
    side: `left`, `right`, `both`, or an empty string at full rank.
    rank: The rank, or None at full rank.
    state_bytes: Bytes of its bases and moments.
    adam_bytes: Bytes of its moments under Adam in float32.
  """

  path: str
  shape: tuple[int, ...]
  matrix: str
  side: str
  rank: int | None
  state_bytes: int
  adam_bytes: int


@dataclasses.dataclass(frozen=True, repr=False)
class Description:
  """The plan of an optimizer; prints as a table.

  Attributes:
    rows: One row a leaf.
    total_bytes: Bytes of the whole optimizer state, counters included.
  """

  rows: tuple[Row, ...]
  total_bytes: int

  def __str__(self) -> str:
    """The table."""
    head = ("leaf", "shape", "matrix", "side", "rank", "state", "Adam")
    lines = [
      (
        row.path,
        str(row.shape),
        row.matrix or "-",
        row.side or "full rank",
        str(row.rank or "-"),
        f"{row.state_bytes:,}",
        f"{row.adam_bytes:,}",
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
    )
    widths = [
      max(map(len, column)) for column in zip(head, *lines, total, strict=False)
    ]
    rule = tuple("-" * width for width in widths)
    text = []
    for line in (head, rule, *lines, rule, total):
      cells = [
        cell.rjust(width) if i >= 4 else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(line, widths, strict=False))
      ]
      text.append("  ".join(cells).rstrip())
    return "\n".join(text)

  __repr__ = __str__


def describe(
  tx: optax.GradientTransformation, params: optax.Params
) -> Description:
  """What an optimizer projects, and what its state costs, leaf by leaf.

  Args:
    tx: Any optimizer, with GaLore anywhere in it or not at all.
    params: Parameters, or their `jax.ShapeDtypeStruct`. Nothing is allocated.

  Returns:
    A table to print: leaf, shape, matrix view, projected side, rank, bytes of
    the leaf's optimizer state, and bytes under Adam in float32.

  Raises:
    ValueError: If the optimizer does not fit the parameters.

  Example:
    >>> import optax
    >>> from galore_optax import describe, galore
    >>> params = {"mlp": jnp.zeros((8, 512, 1376)), "norm": jnp.zeros((8, 512))}
    >>> print(describe(galore(optax.adam(1e-3), rank=128), params))
    leaf         shape           matrix           side       rank       state        Adam
    -----------  --------------  ---------------  ---------  ----  ----------  ----------
    mlp          (8, 512, 1376)  8 x (512, 1376)  left        128  13,369,344  45,088,768
    norm         (8, 512)        -                full rank     -      32,768      32,768
    -----------  --------------  ---------------  ---------  ----  ----------  ----------
    total bytes                                                    13,402,120  45,121,536
  """  # noqa: E501
  state = jax.eval_shape(tx.init, params)
  leaves = paths.leaves_by_path(params)
  owned = dict.fromkeys(leaves, 0)
  bases: dict[str, Any] = {}
  for x in jax.tree.leaves(state, is_leaf=_is_state):
    if _is_state(x):
      bases |= x.projector
  for keys, x in jax.tree_util.tree_flatten_with_path(state)[0]:
    path = _owner(keys, leaves)
    if path is not None:
      owned[path] += _leaf_bytes(x)
  rows = tuple(
    _row(path, leaf, bases.get(path), owned[path])
    for path, leaf in leaves.items()
  )
  return Description(rows, state_bytes(state))


def _is_state(x: Any) -> bool:
  return isinstance(x, GaLoreState)


def _owner(keys: tuple, leaves: Any) -> str | None:
  """The parameter to which a leaf of the state belongs.

  It is the one whose path ends the leaf's path, or is a key on the way.
  """
  names = [getattr(key, "key", None) for key in keys]
  for name in names:
    if isinstance(name, str) and name in leaves and "/" in name:
      return name
  for start in range(len(keys)):
    path = paths.paths([keys[start:]])[0]
    for candidate in (path, path.rpartition("/")[0]):
      if candidate in leaves:
        return candidate
  return None


def _row(path: str, leaf: Any, bases: Any, owned: int) -> Row:
  shape = tuple(jnp.shape(leaf))
  adam = 2 * math.prod(shape) * 4
  if not bases:
    return Row(path, shape, "", "", None, owned, adam)
  side = "both" if len(bases) == 2 else next(iter(bases))
  *stack, size, rank = next(iter(bases.values())).shape
  other = math.prod(shape) // (math.prod(stack) * size)
  dims = (other, size) if side == "right" else (size, other)
  count = f"{math.prod(stack)} x " if stack else ""
  return Row(path, shape, f"{count}{dims}", side, rank, owned, adam)
