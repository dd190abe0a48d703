"""Which leaf is projected and how: ordered rules to one static site a leaf."""

import collections
import contextlib
import contextvars
import dataclasses
import difflib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_optax import checks
from galore_optax.subspace import projection
from galore_optax.tree import matrix_view, paths

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full", "auto")

# Leaves that the papers leave at full rank, recognised by their paths:
# embeddings, output heads, norms, and the vectors that stacking layers turns
# into two-dimensional arrays. Keys of flat dicts join names by dots.
_FULL_RANK_PATHS = re.compile(
  r"(^|[./])[^./]*(embed|norm)[^./]*([./]|$)"
  r"|(^|[./])(wte|wpe|ln|ln_?\w{1,3}|lm_head|unembed\w*)([./]|$)"
  r"|(^|[./])(head|output|logits|classifier|score)([./](kernel|weight|w))?$"
  r"|(^|[./])(bias|scale)$",
  re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
  """How the leaves that a rule matches are projected.

  What is None is taken from the arguments of :func:`galore_optax.galore`.

  Attributes:
    rank: Number of directions that are kept (an int), or the fraction of the
      shorter side (a float in (0, 1]).
    update_proj_gap: Steps between two refreshes of a basis.
    scale: Factor on the lifted update, the papers' α.
    proj_type: Which side is projected, one of `std`, `reverse_std`, `left`,
      `right`, `full`, `auto`; see :func:`galore_optax.galore`.
    rows: Axis or axes of the leaf that are a matrix's rows (default -2).
    cols: Axis or axes that are its columns (default -1). The axes left over
      count matrices, each with a basis of its own.

  Example:
    A rank-64 projection of a kernel (embed, heads, head_dim), read as one
    embed x (heads · head_dim) matrix:

    >>> Projection(rank=64, rows=0, cols=(1, 2)).rank
    64
  """

  rank: Any = None
  update_proj_gap: Any = None
  scale: Any = None
  proj_type: str | None = None
  rows: matrix_view.Axes | None = None
  cols: matrix_view.Axes | None = None

  def __post_init__(self):
    """Refuses values that no leaf could use."""
    checks.check_rank(self.rank)
    checks.check_positive("update_proj_gap", self.update_proj_gap)
    checks.check_number("scale", self.scale)
    checks.check_choice("proj_type", self.proj_type, PROJ_TYPES)

  def filled(self, defaults: "Projection") -> "Projection":
    """This projection, with what it leaves open taken from `defaults`."""
    given = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if getattr(self, field.name) is not None
    }
    return dataclasses.replace(defaults, **given)


Rules = Sequence[tuple[str, Projection | None]]


@dataclasses.dataclass(frozen=True)
class Site:
  """One projected leaf: what is static about it, and its gap and scale.

  Attributes:
    path: The leaf's path, such as `layers/attn/q/kernel`.
    view: How the leaf is read as matrices (..., m, n).
    sides: The sides with a basis, of `left` (m, r) and `right` (n, r).
    rank: Number of directions r.
    gap: Steps between two refreshes, possibly traced.
    scale: Factor on the lifted update, possibly traced.
    spread: Whether the stack's matrices are known to be divided among devices.
    walked: Whether the projected side of each of the stack's matrices is known
      to be divided among devices. They are then projected and lifted one after
      another, so that what devices send each other is one matrix's at a time.
  """

  path: str
  view: matrix_view.MatrixView
  sides: tuple[str, ...]
  rank: int
  gap: Any
  scale: Any
  spread: bool = False
  walked: bool = False

  def basis_shape(self, side: str) -> tuple[int, ...]:
    """Shape of a side's basis, (..., m, r) or (..., n, r)."""
    size = self.view.m if side == "left" else self.view.n
    return (*self.view.stack, size, self.rank)

  @property
  def low_shape(self) -> tuple[int, ...]:
    """Shape of the projected gradient R."""
    m = self.rank if "left" in self.sides else self.view.m
    n = self.rank if "right" in self.sides else self.view.n
    return (*self.view.stack, m, n)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Ordered rules, and what holds for the leaves that none of them matches.

  Attributes:
    rules: `(regex, Projection or None)`, searched in a leaf's path; the first
      that matches decides, None leaves the leaf at full rank.
    defaults: The projection of the leaves without a rule of their own.
    always: Whether also matrices are projected whose state would not shrink.
    seeded: Whether of bases only a seed is kept, so that they take no room.
    partitions: Path to the partition of a leaf, as far as they are known.
  """

  rules: tuple[tuple[str, Projection | None], ...]
  defaults: Projection
  always: bool = False
  seeded: bool = False
  partitions: Mapping[str, tuple] = dataclasses.field(
    default_factory=dict, hash=False
  )

  def sites(
    self, leaves: Mapping[str, Any], masked: Sequence[str] = ()
  ) -> dict[str, Site]:
    """The projected leaves of a parameter tree.

    Args:
      leaves: Path to leaf, see :func:`galore_optax.tree.paths.leaves_by_path`.
      masked: Paths of leaves that are someone else's; rules may match them.

    Returns:
      Path to site, in the order of the leaves.

    Raises:
      ValueError: If a rule matches no leaf or does not fit the leaf it matches.
      TypeError: If a leaf is neither real nor complex floating point or is
        quantised, or a rule asks for the projection of a complex one.
    """
    self._check_rules([*leaves, *masked])
    paths.check_arrays(leaves, BEFORE_QUANTISING)
    found = {path: self._site(path, leaf) for path, leaf in leaves.items()}
    sites = {path: x for path, x in found.items() if isinstance(x, Site)}
    reasons = {path: x for path, x in found.items() if isinstance(x, str)}
    notes = _NOTES.get()
    if notes is not None:
      notes.update(reasons)
    if not sites:
      _warn_of_nothing(leaves, reasons, whole=not masked)
    return sites

  def bound(
    self, leaves: Mapping[str, Any], kept: Mapping[str, Mapping]
  ) -> dict[str, Site]:
    """The sites that a state was initialised with.

    Ranks and sides are read off the bases, so that the numbers given to
    `galore` may by now be traced values.

    Args:
      leaves: Path to gradient.
      kept: Path to side to basis, from the state.

    Returns:
      Path to site, in the order of the paths: in that in which `init` fills a
      dict only until a transformation takes it apart and sorts its keys.

    Raises:
      ValueError: If the gradients are not those of the initialised parameters.
      TypeError: If they are quantised.
    """
    paths.check_arrays(leaves, AT_ARRAYS)
    missing = [path for path in kept if path not in leaves]
    if missing:
      raise ValueError(
        f"The state projects the leaf {missing[0]!r}, which the gradients do "
        f"not have; they have {_some(leaves)}. Pass gradients of the "
        "parameters that `init` was called with."
      )
    return {
      path: self._bound_site(path, leaves[path], bases)
      for path, bases in sorted(kept.items())
    }

  def _bound_site(self, path: str, leaf: Any, bases: Mapping) -> Site:
    _, how = self._rule(path)
    shape = np.shape(leaf)
    view = matrix_view.matrix_view(shape, how.rows, how.cols) if how else None
    sides = tuple(bases)
    shapes = {side: projection.shape_of(x) for side, x in bases.items()}
    rank = shapes[sides[0]][-1]
    if how is not None and view is not None:
      site = self._place(path, view, sides, rank, how)
      if shapes == {side: site.basis_shape(side) for side in sides}:
        return site
    raise ValueError(
      f"The gradient of the leaf {path!r} has shape {shape}, which does not "
      f"fit the state's basis of shape {shapes[sides[0]]}. Pass gradients "
      "of the parameters that `init` was called with, to the same optimizer."
    )

  def _place(
    self,
    path: str,
    view: matrix_view.MatrixView,
    sides: tuple[str, ...],
    rank: int,
    how: Projection,
  ) -> Site:
    *stack, rows, cols = view.spec(self.partitions.get(path, ()))
    divided = {"left": rows, "right": cols}
    return Site(
      path,
      view,
      sides,
      rank,
      how.update_proj_gap,
      how.scale,
      spread=any(stack),
      walked=bool(stack)
      and not any(stack)
      and any(divided[side] for side in sides),
    )

  def _sides(
    self, path: str, view: matrix_view.MatrixView, rank: int, proj_type: str
  ) -> tuple[str, ...]:
    """The sides with a basis; of `auto`, the one that no device divides."""
    *_, rows, cols = view.spec(self.partitions.get(path, ()))
    if proj_type == "auto" and bool(rows) != bool(cols):
      return ("right",) if rows else ("left",)
    return choose_sides(proj_type, view.m, view.n, rank)

  def _check_rules(self, leaves: Sequence[str]) -> None:
    for pattern, _ in self.rules:
      if not any(re.search(pattern, path) for path in leaves):
        near = difflib.get_close_matches(pattern, list(leaves), n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
          f"The rule {pattern!r} in `rules` matches no leaf.{hint} The leaves "
          f"are {_some(leaves)}; a pattern is searched in the path (re.search)."
        )

  def scale(self, path: str) -> Any:
    """The factor on the updates of a matrix that rules and names project."""
    _, how = self._rule(path)
    assert how is not None
    return how.scale

  def projects(self, path: str) -> bool:
    """Whether rules and names let a leaf be projected, if it is a matrix."""
    return self._rule(path)[1] is not None

  def _rule(self, path: str) -> tuple[str | None, Projection | None]:
    """The rule of the user's that decided, if one did, and the decision."""
    for pattern, how in self.rules:
      if re.search(pattern, path):
        return pattern, None if how is None else how.filled(self.defaults)
    return None, None if _FULL_RANK_PATHS.search(path) else self.defaults

  def _site(self, path: str, leaf: Any) -> Site | str:
    """The projected leaf, or why it stays at full rank."""
    rule, how = self._rule(path)
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise TypeError(
        f"The leaf {path!r} is {dtype}; only floating-point leaves have "
        "gradients. Take it out of the parameters, or wrap the optimizer in "
        "`optax.masked`."
      )
    if how is None:
      return "its name" if rule is None else f"rule {rule!r}"
    if jnp.issubdtype(dtype, jnp.complexfloating):
      if rule is None:
        return "complex"
      raise TypeError(
        f"The leaf {path!r} is {dtype}; projection is for real leaves. Give it "
        "the rule None, and it is optimised at full rank."
      )
    return self._fit(path, np.shape(leaf), how, rule is not None)

  def _fit(
    self, path: str, shape: tuple[int, ...], how: Projection, explicit: bool
  ) -> Site | str:
    try:
      view = matrix_view.matrix_view(shape, how.rows, how.cols)
      if view is None or 0 in shape:
        if explicit and view is None:
          raise ValueError(f"`rules` project a leaf of shape {shape}")
        return "empty" if 0 in shape else "no matrix"
      rank = resolve_rank(how.rank, view.m, view.n)
    except ValueError as error:
      raise ValueError(f"At the leaf {path!r}: {error}") from error
    sides = self._sides(path, view, rank, how.proj_type or "std")
    site = self._place(path, view, sides, rank, how)
    elements = state_elements(view.m, view.n, rank, sides)
    if self.seeded:
      long = {"left": view.m, "right": view.n}
      elements -= rank * sum(long[side] for side in sides)
    saves = elements < 2 * view.m * view.n
    if saves or explicit or self.always:
      return site
    return f"no smaller at rank {rank}" if min(view.m, view.n) > 1 else "thin"


# What to do where arrays are needed, for `paths.check_arrays`.
BEFORE_QUANTISING = (
  "The optimizer's state is made for arrays: give `init` the parameters before "
  "`quantize_params`, or `dequantize_params(params)`."
)
AT_ARRAYS = (
  "Take gradients at `dequantize_params(params)`, give `update` that and its "
  "result, and add the updates with `galore_optax.apply_updates`."
)

# Where reasons for full rank are written down, while someone asks for them.
_NOTES: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar(
  "reasons for full rank", default=None
)


@contextlib.contextmanager
def noting_reasons() -> Iterator[dict[str, str]]:
  """Collects why leaves stay at full rank, of all plans that are made inside.

  Yields:
    Path to reason: `its name`, `rule 'REGEX'`, `no matrix` (fewer than two
    axes), `empty`, `complex`, `no smaller at rank R`, or `thin` (one row or
    column).
  """
  notes: dict[str, str] = {}
  token = _NOTES.set(notes)
  try:
    yield notes
  finally:
    _NOTES.reset(token)


def _warn_of_nothing(
  leaves: Mapping[str, Any], reasons: Mapping[str, str], whole: bool
) -> None:
  """Warns that no leaf is projected, with the reasons.

  Of a part of a tree only if its matrices are too small: it may be one that
  the user meant to keep at full rank, such as the embedding.
  """
  small = any(reason.startswith("no smaller") for reason in reasons.values())
  if not leaves or not (whole or small):
    return
  counts = collections.Counter(reasons.values()).most_common()
  told = ", ".join(f"{reason} ({count})" for reason, count in counts)
  if small:
    advice = "Take a smaller `rank`, such as 0.25 of the shorter side."
  elif "its name" in reasons.values():
    advice = "`rules` project leaves whatever their names."
  else:
    advice = "It projects leaves of two axes or more."
  warnings.warn(
    f"galore projects none of the {len(leaves)} leaves and saves nothing; they "
    f"stay at full rank because of: {told}. {advice} "
    "`galore_optax.describe(tx, params)` shows every leaf.",
    stacklevel=4,  # of the call of `init`, where nothing stands between
  )


def choose_sides(proj_type: str, m: int, n: int, rank: int) -> tuple[str, ...]:
  """The sides of an m x n matrix that get a basis.

  Args:
    proj_type: See :func:`galore_optax.galore`.
    m: Number of rows.
    n: Number of columns.
    rank: Number of directions.

  Returns:
    `("left",)`, `("right",)` or both.

  Example:
    >>> choose_sides("std", 512, 1376, 128)
    ('left',)
    >>> choose_sides("auto", 512, 1376, 128)
    ('right',)
  """
  short = "left" if m <= n else "right"
  long = "left" if m >= n else "right"
  least = min(
    (short, long), key=lambda side: state_elements(m, n, rank, (side,))
  )
  return {
    "std": (short,),
    "reverse_std": (long,),
    "left": ("left",),
    "right": ("right",),
    "full": ("left", "right"),
    "auto": (least,),
  }[proj_type]


def state_elements(m: int, n: int, rank: int, sides: tuple[str, ...]) -> int:
  """Elements of an m x n matrix's bases and two moments.

  With short side s and long side l that is s·r + 2·l·r for `std`, l·r + 2·s·r
  for `reverse_std` and (s + l)·r + 2·r² for `full`, against 2·s·l for Adam.

  Args:
    m: Number of rows.
    n: Number of columns.
    rank: Number of directions.
    sides: The sides with a basis.

  Returns:
    Number of elements.

  Example:
    >>> state_elements(512, 1376, 128, ("left",))
    417792
  """
  bases = rank * (
    (m if "left" in sides else 0) + (n if "right" in sides else 0)
  )
  rows = rank if "left" in sides else m
  cols = rank if "right" in sides else n
  return bases + 2 * rows * cols


def resolve_rank(rank: Any, m: int, n: int) -> int:
  """The rank for an m x n matrix.

  Args:
    rank: A positive integer, or a fraction of the shorter side in (0, 1].
    m: Number of rows.
    n: Number of columns.

  Returns:
    A rank between 1 and min(m, n).

  Raises:
    ValueError: If the rank is traced.

  Example:
    >>> resolve_rank(0.25, 512, 1376), resolve_rank(1024, 512, 1376)
    (128, 512)
  """
  if isinstance(rank, jax.core.Tracer):
    raise ValueError(
      "`rank` decides the shapes of the state and cannot be traced, got "
      f"{rank}. Under `optax.inject_hyperparams`, call `init` outside of "
      "`jax.jit` and `jax.eval_shape`, pass static_args=('rank',), or give the "
      "rank in `rules`."
    )
  short = min(m, n)
  if jnp.issubdtype(jnp.result_type(rank), jnp.floating):
    return max(1, round(float(rank) * short))
  return min(int(rank), short)


def _some(leaves: Iterable[str], limit: int = 8) -> str:
  names = [repr(path) for path in leaves]
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return (", ".join(names[:limit]) + more) or "none"


def check_rules(rules: Any) -> tuple[tuple[str, Projection | None], ...]:
  """Rules as a tuple; raises unless they are `(regex, Projection)` pairs."""
  usage = 'such as [("attn", Projection(rank=64)), ("mlp", None)]'
  if isinstance(rules, str | Mapping):
    raise TypeError(f"`rules` must be pairs {usage}, got {rules!r}.")
  rules = tuple(rules)  # an iterator is read once
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
