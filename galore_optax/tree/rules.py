"""Rules of a user: which leaves are projected, and how."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from galore_optax import checks
from galore_optax.tree import matrix_view
from galore_optax.tree import sides as sides_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
  r"""How the leaves that a rule matches are projected.

  Attributes that are None are taken from the arguments of
  :func:`galore_optax.galore`.

  Attributes:
    rank: Number of directions r (an int), or the fraction of the shorter side
      (a float in (0, 1]). With `tensor`, the number or fraction of each axis
      that is named there, or a tuple with one of these for each.
    update_proj_gap: Steps between two refreshes of a basis.
    scale: Factor on the lifted update, the papers' α.
    proj_type: Which side is projected, one of `std`, `reverse_std`, `left`,
      `right`, `full`, `auto`; see :func:`galore_optax.galore`.
    rows: Axis or axes of the leaf that are a matrix's rows (default -2).
    cols: Axis or axes that are its columns (default -1). The axes left over
      count matrices, each of which has its own basis. Where neither is given
      and Flax's partition metadata name an axis for layers or experts
      (`layers`, `blocks`, `stages`, `experts`, ...), that axis counts matrices,
      and the last two of the others are rows and columns.
    tensor: Axis or axes of the leaf that get a factor each, in place of `rows`,
      `cols` and `proj_type`: the leaf is not read as a matrix. With an
      orthonormal factor :math:`P_i` for each of these axes,

      .. math::

        R_t &= G_t \times_1 P_1^\top \times_2 P_2^\top \dots \\
        U_t &= \alpha\, N_t \times_1 P_1 \times_2 P_2 \dots

      (a Tucker decomposition), so that moments have the shape of the core R.
      All other axes stay whole, such as the window of a convolution, and so
      does an axis whose rank reaches its size.
    stack: With `tensor`, axis or axes that count tensors, each of which has
      factors of its own. By default those that Flax's partition metadata name
      for layers or experts, and else none.

  Raises:
    ValueError: If an attribute is out of its range, or contradicts another.
    TypeError: If one has the wrong type.

  Example:
    A rank-64 projection of a kernel (embed, heads, head_dim), read as one
    embed x (heads · head_dim) matrix:

    >>> Projection(rank=64, rows=0, cols=(1, 2)).rank
    64

    A convolution (height, width, inputs, outputs) with a factor for inputs and
    one for outputs:

    >>> Projection(tensor=(2, 3), rank=(0.25, 16)).tensor
    (2, 3)

  References:
    Tucker, Some Mathematical Notes on Three-Mode Factor Analysis, 1966; for
    factors of gradients George et al., `Tensor-GaLore
    <https://arxiv.org/abs/2501.02379>`_, 2025.
  """

  rank: Any = None
  update_proj_gap: Any = None
  scale: Any = None
  proj_type: str | None = None
  rows: matrix_view.Axes | None = None
  cols: matrix_view.Axes | None = None
  tensor: matrix_view.Axes | None = None
  stack: matrix_view.Axes | None = None

  def __post_init__(self):
    """Raises if a value is out of range for every leaf."""
    if isinstance(self.rank, tuple | list):
      _check_ranks(self)
    else:
      checks.check_rank(self.rank)
    _check_tensor(self)
    checks.check_positive("update_proj_gap", self.update_proj_gap)
    checks.check_number("scale", self.scale)
    checks.check_choice("proj_type", self.proj_type, sides_lib.PROJ_TYPES)

  def filled(self, defaults: "Projection") -> "Projection":
    """This projection, with None replaced by the value in `defaults`."""
    if self.tensor is not None:  # which has no sides to choose from
      defaults = dataclasses.replace(defaults, proj_type=None)
    given = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if getattr(self, field.name) is not None
    }
    return dataclasses.replace(defaults, **given)


Rules = Sequence[tuple[str, Projection | None]]


def _check_ranks(how: Projection) -> None:
  """Raises unless there is one rank for each axis that gets a factor."""
  ranks = tuple(how.rank)
  object.__setattr__(how, "rank", ranks)
  if how.tensor is None:
    raise ValueError(
      f"`rank` has several entries, got {ranks}, but a matrix has one rank. "
      "Give one number, or name the axes that get a factor, such as "
      "Projection(tensor=(2, 3), rank=(16, 32))."
    )
  for rank in ranks:
    checks.check_rank(checks.required("rank", rank))
  axes = 1 if isinstance(how.tensor, int) else len(tuple(how.tensor))
  if len(ranks) != axes:
    raise ValueError(
      f"`rank` must have one entry for each axis of `tensor`, got {ranks} for "
      f"tensor={how.tensor}."
    )


def _check_tensor(how: Projection) -> None:
  """Raises where `tensor` or `stack` contradicts the attributes of matrices."""
  if how.tensor is None:
    if how.stack is not None:
      raise ValueError(
        f"`stack` is for `tensor`, got stack={how.stack!r} without it. `rows` "
        "and `cols` name the axes of a matrix, and the others count matrices."
      )
    return
  for name in ("rows", "cols", "proj_type"):
    if getattr(how, name) is not None:
      raise ValueError(
        "`tensor` gives axes of a leaf a factor each, where "
        f"{name}={getattr(how, name)!r} is for a leaf that is read as a "
        "matrix. Leave one of the two out."
      )
  for name in ("tensor", "stack"):
    axes = getattr(how, name)
    if isinstance(axes, list):
      object.__setattr__(how, name, tuple(axes))


def refuse_tensors(rules: Rules, what: str) -> None:
  """Raises if a rule gives tensors factors where only matrices will do.

  Args:
    rules: The rules.
    what: What needs matrices, for the error.

  Raises:
    ValueError: If there is such a rule.
  """
  for pattern, how in rules:
    if how is not None and how.tensor is not None:
      raise ValueError(
        f"The rule {pattern!r} in `rules` has tensor={how.tensor!r}, but "
        f"{what}. Read the leaf as a matrix instead, such as "
        "Projection(rows=(0, 1, 2), cols=3) for a convolution."
      )


def check_rules(rules: Any) -> tuple[tuple[str, Projection | None], ...]:
  """Rules as a tuple; raises unless they are `(regex, Projection)` pairs.

  Args:
    rules: See :func:`galore_optax.galore`.

  Returns:
    Pairs of a regular expression and a :class:`Projection` or None.
  """
  usage = 'such as [("attn", Projection(rank=64)), ("mlp", None)]'
  if isinstance(rules, str | Mapping):
    raise TypeError(f"`rules` must be pairs {usage}, got {rules!r}.")
  rules = tuple(rules)  # an iterator can be read only once
  for rule in rules:
    pair = isinstance(rule, tuple | list) and len(rule) == 2
    if not pair or not isinstance(rule[0], str):
      raise TypeError(f"`rules` must be pairs {usage}, got {rule!r}.")
    if not (rule[1] is None or isinstance(rule[1], Projection)):
      raise TypeError(
        f"The rule {rule[0]!r} in `rules` must give a Projection or None, got "
        f"{rule[1]!r}."
      )
    try:
      re.compile(rule[0])
    except re.error as error:
      raise ValueError(
        f"The rule {rule[0]!r} in `rules` is not a regular expression: {error}."
      ) from error
  return tuple((pattern, how) for pattern, how in rules)
