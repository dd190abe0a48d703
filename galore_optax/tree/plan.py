"""Decides which leaves are projected, and how: ordered rules and a plan.

A :class:`Plan` turns rules and defaults into one :class:`Site` for each leaf
that is projected.
"""

import collections
import contextlib
import contextvars
import dataclasses
import difflib
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from galore_optax.tree import matrix_view, paths, readings, tensor_view
from galore_optax.tree import names as names_lib
from galore_optax.tree import sides as sides_lib
from galore_optax.tree.rules import Projection


@dataclasses.dataclass(frozen=True)
class Site:
  """One projected leaf: its view, sides, rank, gap and scale.

  Attributes:
    path: The leaf's path, such as `layers/attn/q/kernel`.
    view: How the leaf is read as matrices (..., m, n), or as tensors.
    sides: The sides with a basis: of a matrix `left` (m, r) and `right` (n, r),
      of a tensor `axis0` and so on, see :mod:`galore_optax.tree.sides`.
    ranks: Number of directions r of each side.
    gap: Steps between two refreshes, possibly traced.
    scale: Factor on the lifted update, possibly traced.
    sharded: Whether the axis that counts the stack's matrices is known to be
      divided over devices.
    one_by_one: Whether the stack's matrices are projected and lifted one after
      another. That is so where the projected side is known to be divided over
      devices: they then communicate one matrix at a time.
  """

  path: str
  view: readings.View
  sides: tuple[str, ...]
  ranks: tuple[int, ...]
  gap: Any
  scale: Any
  sharded: bool = False
  one_by_one: bool = False

  @property
  def is_tensor(self) -> bool:
    """Whether the leaf is read as tensors."""
    return isinstance(self.view, tensor_view.TensorView)

  @property
  def matrix(self) -> matrix_view.MatrixView:
    """The view of a leaf that is read as matrices."""
    if isinstance(self.view, tensor_view.TensorView):
      raise TypeError(f"The leaf {self.path!r} is read as tensors.")
    return self.view

  @property
  def rank(self) -> int:
    """Number of directions of a matrix; both of its sides have the same."""
    return max(self.ranks)

  def rank_of(self, side: str) -> int:
    """Number of directions of a side."""
    return self.ranks[self.sides.index(side)]

  def basis_shape(self, side: str) -> tuple[int, ...]:
    """Shape of a side's basis, (..., m, r) or (..., n, r)."""
    size = self.view.dims[sides_lib.axis_of(side)]
    return (*self.view.stack, size, self.rank_of(side))

  def basis_spec(self, side: str, spec: Sequence) -> tuple:
    """Partition of a side's basis that follows from the leaf's partition."""
    parts, stack = self.view.spec(spec), len(self.view.stack)
    return (*parts[:stack], parts[stack + sides_lib.axis_of(side)], None)

  @property
  def low_shape(self) -> tuple[int, ...]:
    """Shape of the projected gradient R."""
    dims = list(self.view.dims)
    for side in self.sides:
      dims[sides_lib.axis_of(side)] = self.rank_of(side)
    return (*self.view.stack, *dims)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Ordered rules, and defaults for the leaves that no rule matches.

  Attributes:
    rules: `(regex, Projection or None)`, searched in a leaf's path; the first
      that matches decides, None leaves the leaf at full rank.
    defaults: The projection of the leaves without a rule of their own.
    always: Whether matrices are projected even if their state would not shrink.
    seeded: Whether the state keeps only a seed of each basis, which then takes
      no memory.
    partitions: Path to the partition of a leaf, for the leaves where it is
      known.
  """

  rules: tuple[tuple[str, Projection | None], ...]
  defaults: Projection
  always: bool = False
  seeded: bool = False
  partitions: Mapping[str, tuple] = dataclasses.field(
    default_factory=dict, hash=False
  )

  def sites(
    self,
    leaves: Mapping[str, Any],
    masked: Sequence[str] = (),
    axis_names: Mapping[str, tuple] | None = None,
  ) -> dict[str, Site]:
    """The projected leaves of a parameter tree.

    Args:
      leaves: Path to leaf, see :func:`galore_optax.tree.paths.leaves_by_path`.
      masked: Paths of leaves that another optimizer updates. Rules may match
        them.
      axis_names: See :func:`galore_optax.tree.boxes.axis_names`.

    Returns:
      Path to site, in the sequence of the leaves.

    Raises:
      ValueError: If a rule matches no leaf or does not fit the leaf it matches.
      TypeError: If a leaf is neither real nor complex floating point or is
        quantized, or a rule asks for the projection of a complex one.
    """
    self._check_rules([*leaves, *masked])
    paths.check_arrays(leaves, BEFORE_QUANTIZING)
    stacked = {
      p: names_lib.stacked_axes(x) for p, x in (axis_names or {}).items()
    }
    decisions = {
      path: names_lib.NAME
      if names_lib.is_bias(path, leaves) and self._rule(path)[0] is None
      else self._decide(path, leaf, stacked.get(path, ()))
      for path, leaf in leaves.items()
    }
    sites = {path: x for path, x in decisions.items() if isinstance(x, Site)}
    reasons = {path: x for path, x in decisions.items() if isinstance(x, str)}
    self._record(decisions, axis_names or {})
    if not sites:
      _warn_nothing_projected(leaves, reasons, whole=not masked)
    _warn_of_many(
      {
        path: site.view
        for path, site in sites.items()
        if isinstance(site.view, matrix_view.MatrixView)
        and not (stacked.get(path) or self._axes(path))
      }
    )
    return sites

  def _record(
    self,
    decisions: Mapping[str, Site | str],
    axis_names: Mapping[str, tuple],
  ) -> None:
    """Records decisions, if someone wants to know."""
    record = _RECORD.get()
    if record is None:
      return
    for path, x in decisions.items():
      if isinstance(x, str):
        site = record[path].site if path in record else None
        record[path] = Decision(site, x, guessed=x == names_lib.NAME)
        continue
      axes = () if self._axes(path) else axis_names.get(path, ())
      names = [str(axes[axis]) for axis in names_lib.stacked_axes(axes)]
      record[path] = Decision(x, _axis_reason(names), guessed=bool(names))

  def _axes(self, path: str) -> bool:
    """Whether a rule says which axes of a leaf count matrices or tensors."""
    _, how = self._rule(path)
    return how is not None and not readings.takes_names(how)

  def sites_from_bases(
    self, leaves: Mapping[str, Any], shapes: Mapping[str, Mapping[str, tuple]]
  ) -> dict[str, Site]:
    """The sites that a state was initialized with.

    Ranks and sides are read off the bases, because the numbers given to
    `galore` may be traced values by now.

    Args:
      leaves: Path to gradient.
      shapes: Path to side to shape of the basis in the state.

    Returns:
      Path to site, sorted by path. JAX transformations sort the keys of a dict,
      so that the sequence in which `init` filled it is lost.

    Raises:
      ValueError: If the gradients are not those of the initialized parameters.
      TypeError: If they are quantized.
    """
    paths.check_arrays(leaves, AT_ARRAYS)
    missing = [path for path in shapes if path not in leaves]
    if missing:
      raise ValueError(
        f"The state projects the leaf {missing[0]!r}, which the gradients do "
        f"not have; they have {_some(leaves)}. Pass gradients of the "
        "parameters that `init` was called with."
      )
    return {
      path: self._site_from_bases(path, leaves[path], of_leaf)
      for path, of_leaf in sorted(shapes.items())
    }

  def _site_from_bases(
    self, path: str, leaf: Any, shapes: Mapping[str, tuple]
  ) -> Site:
    rule, how = self._rule(path)
    # A state of an older version may project what names keep at full rank now.
    how = how or (self.defaults if rule is None else None)
    shape = np.shape(leaf)
    first, *_ = shapes.values()
    ranks = tuple(x[-1] for x in shapes.values())
    for view in readings.possible(shape, how):
      assert how is not None  # or there are no views
      if not readings.has_sides(view, shapes):
        continue
      site = self._make_site(path, view, tuple(shapes), ranks, how)
      if dict(shapes) == {side: site.basis_shape(side) for side in shapes}:
        _check_rank(site, how.rank)
        return site
    raise ValueError(
      f"The gradient of the leaf {path!r} has shape {shape}, which does not "
      f"fit the state's basis of shape {first}. Pass gradients of the "
      "parameters that `init` was called with, to the same optimizer."
    )

  def _check_found_again(self, site: Site) -> None:
    """Raises if the bases alone do not tell how a leaf is read as matrices.

    An update knows no names of axes: `nnx.Optimizer`, for one, takes gradients
    out of their boxes.
    """
    shapes = {side: site.basis_shape(side) for side in site.sides}
    leaf = jax.ShapeDtypeStruct(site.view.shape, jnp.float32)
    found = self._site_from_bases(site.path, leaf, shapes).view
    if found != site.view:
      view = site.view
      if isinstance(view, tensor_view.TensorView):
        axes = tuple(view.axes[axis] for axis in view.factored)
        rule = f"Projection(tensor={axes}, stack={view.batch})"
      else:
        rule = f"Projection(rows={view.rows[0]}, cols={view.cols[0]})"
      raise ValueError(
        f"The leaf {site.path!r} of shape {view.shape} stacks layers on the "
        f"axes {view.batch}, but its bases would have the same shape if it "
        f"did on {found.batch}. Say it by a rule: ({site.path!r}, {rule})."
      )

  def _make_site(
    self,
    path: str,
    view: readings.View,
    sides: tuple[str, ...],
    ranks: tuple[int, ...],
    how: Projection,
  ) -> Site:
    parts = view.spec(self.partitions.get(path, ()))
    stack, divided = parts[: len(view.stack)], parts[len(view.stack) :]
    return Site(
      path,
      view,
      sides,
      ranks,
      how.update_proj_gap,
      how.scale,
      sharded=any(stack),
      one_by_one=bool(stack)
      and not any(stack)
      and any(divided[sides_lib.axis_of(side)] for side in sides),
    )

  def _sides(
    self, path: str, view: matrix_view.MatrixView, rank: int, proj_type: str
  ) -> tuple[str, ...]:
    """The projected sides; for `auto`, the side that devices do not divide."""
    *_, rows, cols = view.spec(self.partitions.get(path, ()))
    if proj_type == "auto" and bool(rows) != bool(cols):
      return ("right",) if rows else ("left",)
    return sides_lib.choose_sides(proj_type, view.m, view.n, rank)

  def _check_rules(self, leaves: Sequence[str]) -> None:
    for pattern, _ in self.rules:
      if not any(re.search(pattern, path) for path in leaves):
        near = difflib.get_close_matches(pattern, list(leaves), n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
          f"The rule {pattern!r} in `rules` matches no leaf.{hint} The leaves "
          f"are {_some(leaves)}; a pattern is searched in the path (re.search)."
        )

  def check_full_rank_axes(
    self,
    name: str,
    leaves: Mapping[str, Any],
    axis_names: Mapping[str, tuple],
    projected: Iterable[str],
  ) -> None:
    """Refuses a matrix at full rank that is not its leaf's last two axes.

    Args:
      name: Name of the optimizer, which takes the last two axes for a matrix.
      leaves: Path to leaf.
      axis_names: See :func:`galore_optax.tree.boxes.axis_names`.
      projected: Paths of the projected leaves.

    Raises:
      ValueError: If Flax's metadata say that such a leaf stacks layers on
        another axis.
    """
    for path in [x for x in axis_names if x in leaves and x not in projected]:
      shape, how = np.shape(leaves[path]), self._rule(path)[1]
      if how is None or jnp.iscomplexobj(leaves[path]):
        continue
      stacked = names_lib.stacked_axes(axis_names[path])
      if readings.read(shape, how, stacked) != matrix_view.matrix_view(shape):
        raise ValueError(
          f"{name} cannot update the leaf {path!r} at full rank: its shape is "
          f"{shape}, and the axes {stacked} stack layers, but the inner "
          "optimizer takes the last two axes for a matrix. Give it the rule "
          "None for AdamW, or a smaller `rank` to project it."
        )

  def scale(self, path: str) -> Any:
    """The factor on the updates of a leaf that is projected."""
    _, how = self._rule(path)
    assert how is not None
    return how.scale

  def projects(self, path: str) -> bool:
    """Whether rules and the leaf's name allow that it is projected."""
    return self._rule(path)[1] is not None

  def _rule(self, path: str) -> tuple[str | None, Projection | None]:
    """The user's rule that matches, if any, and the projection that applies."""
    for pattern, how in self.rules:
      if re.search(pattern, path):
        return pattern, None if how is None else how.filled(self.defaults)
    return None, None if names_lib.is_of_full_rank(path) else self.defaults

  def _decide(
    self, path: str, leaf: Any, stacked: tuple[int, ...]
  ) -> Site | str:
    """The leaf's site, or the reason why it stays at full rank."""
    rule, how = self._rule(path)
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise TypeError(
        f"The leaf {path!r} is {dtype}; only floating-point leaves have "
        "gradients. Take it out of the parameters, or wrap the optimizer in "
        "`optax.masked`."
      )
    if jnp.finfo(dtype).bits < 16:
      raise TypeError(
        f"The leaf {path!r} is {dtype}, which has too few bits for updates to "
        "be added to. Train it in 16 bits or more, or wrap the optimizer in "
        "`optax.masked`."
      )
    if how is None:
      return names_lib.NAME if rule is None else f"rule {rule!r}"
    if jnp.issubdtype(dtype, jnp.complexfloating):
      if rule is None:
        return "complex"
      raise TypeError(
        f"The leaf {path!r} is {dtype}; only real leaves are projected. Give "
        "it the rule None to optimize it at full rank."
      )
    return self._decide_by_shape(
      path, np.shape(leaf), how, rule is not None, stacked
    )

  def _decide_by_shape(
    self,
    path: str,
    shape: tuple[int, ...],
    how: Projection,
    explicit: bool,
    stacked: tuple[int, ...],
  ) -> Site | str:
    try:
      view = readings.read(shape, how, stacked)
      if isinstance(view, tensor_view.TensorView):
        return "empty" if 0 in shape else self._tensor_site(path, view, how)
      if view is None or 0 in shape:
        if explicit and view is None:
          raise ValueError(f"`rules` project a leaf of shape {shape}")
        return "empty" if 0 in shape else "no matrix"
      rank = sides_lib.resolve_rank(how.rank, view.m, view.n)
    except ValueError as error:
      raise ValueError(f"At the leaf {path!r}: {error}") from error
    sides = self._sides(path, view, rank, how.proj_type or "std")
    site = self._make_site(path, view, sides, (rank,) * len(sides), how)
    elements = sides_lib.state_elements(view.m, view.n, rank, sides)
    if self.seeded:
      size = {"left": view.m, "right": view.n}
      elements -= rank * sum(size[side] for side in sides)
    saves = elements < 2 * view.m * view.n
    if saves or explicit or self.always:
      self._check_found_again(site)
      return site
    return f"no smaller at rank {rank}" if min(view.m, view.n) > 1 else "thin"

  def _tensor_site(
    self, path: str, view: tensor_view.TensorView, how: Projection
  ) -> Site:
    """The site of a leaf that a rule gives factors."""
    ranks = sides_lib.tensor_ranks(how.rank, view.dims, view.factored)
    sides = tuple(sides_lib.tensor_side(axis) for axis in ranks)
    site = self._make_site(path, view, sides, tuple(ranks.values()), how)
    self._check_found_again(site)
    return site


def _axis_reason(names: Sequence[str]) -> str:
  return f"axis {', '.join(map(repr, names))}" if names else ""


def _check_rank(site: Site, rank: Any) -> None:
  """Raises if a state has another rank than the optimizer, which may be traced.

  `flax.serialization` restores arrays of any shape without a word.
  """
  if rank is None or isinstance(rank, jax.core.Tracer):
    return
  view = site.view
  if isinstance(view, tensor_view.TensorView):
    ranks = sides_lib.tensor_ranks(rank, view.dims, view.factored)
    wanted: Any = {sides_lib.tensor_side(k): r for k, r in ranks.items()}
    found: Any = dict(zip(site.sides, site.ranks, strict=True))
  else:
    wanted = sides_lib.resolve_rank(rank, view.m, view.n)
    found = site.rank if len({*site.ranks}) == 1 else site.ranks
  if wanted != found:
    raise ValueError(
      f"The state's basis of the leaf {site.path!r} has rank {found}, but this "
      f"optimizer has rank {wanted} there. Restore the state into that of an "
      "optimizer with the same `rank`."
    )


# Advice for `paths.check_arrays`, at `init` and at `update`.
BEFORE_QUANTIZING = (
  "The optimizer's state is made of arrays: give `init` the parameters before "
  "`quantize_params`, or `dequantize_params(params)`."
)
AT_ARRAYS = (
  "Take gradients at `dequantize_params(params)`, give `update` that and its "
  "result, and add the updates with `galore_optax.apply_updates`."
)


class Decision(NamedTuple):
  """What a plan decided about a leaf.

  Attributes:
    site: How the leaf is projected; None at full rank. Of several plans for a
      leaf, the last that projects it counts; the state tells whether it is.
    reason: Why it stays at full rank: `its name`, `rule 'REGEX'`, `no matrix`
      (fewer than two axes), `empty`, `complex`, `no smaller at rank R`, or
      `thin` (one row or column). If it is projected and has named axes that
      stack layers, these axes.
    guessed: Whether that was guessed from a name. A rule overrides it.
  """

  site: Site | None
  reason: str
  guessed: bool


# Collects decisions inside of `recording_decisions`.
_RECORD: contextvars.ContextVar[dict[str, Decision] | None] = (
  contextvars.ContextVar("decisions about leaves", default=None)
)


@contextlib.contextmanager
def recording_decisions() -> Iterator[dict[str, Decision]]:
  """Records what all plans decide that are made in the context.

  Yields:
    Path to decision.
  """
  record: dict[str, Decision] = {}
  token = _RECORD.set(record)
  try:
    yield record
  finally:
    _RECORD.reset(token)


def _warn_nothing_projected(
  leaves: Mapping[str, Any], reasons: Mapping[str, str], whole: bool
) -> None:
  """Warns that no leaf is projected, and why.

  For a part of a tree it warns only if its matrices are too small: the user may
  have meant to leave the part at full rank, for instance the embedding.
  """
  small = any(reason.startswith("no smaller") for reason in reasons.values())
  if not leaves or not (whole or small):
    return
  counts = collections.Counter(reasons.values()).most_common()
  listed = ", ".join(f"{reason} ({count})" for reason, count in counts)
  if small:
    advice = "Take a smaller `rank`, such as 0.25 of the shorter side."
  elif names_lib.NAME in reasons.values():
    advice = "Give `rules` to project leaves whatever their names are."
  else:
    advice = "Only leaves of two axes or more are projected."
  warnings.warn(
    f"galore projects none of the {len(leaves)} leaves and saves no memory; "
    f"they stay at full rank because of: {listed}. {advice} "
    "`galore_optax.describe(tx, params)` shows every leaf.",
    stacklevel=4,  # the call of `init`, unless a wrapper is in between
  )


def _warn_of_many(views: Mapping[str, matrix_view.MatrixView]) -> None:
  """Warns of leaves that seem to stack layers on another axis than the first.

  They are read as more matrices than a matrix has rows or columns.
  """
  many = {
    path: x
    for path, x in views.items()
    if x.stack and max(x.stack) > min(x.m, x.n)
  }
  if not many:
    return
  listed = [
    f"{path!r} {x.shape} is read as {x.count} matrices of {x.m} x {x.n}"
    for path, x in itertools.islice(many.items(), 8)
  ]
  more = f", and {len(many) - 8} more leaves" if len(many) > 8 else ""
  rule = f"({next(iter(many))!r}, Projection(rows=0, cols=-1))"
  warnings.warn(
    f"More matrices than a matrix has rows or columns: {', '.join(listed)}"
    f"{more}. If another axis counts layers, name the two axes of a matrix in "
    f"`rules`, such as {rule}, or the one of layers in Flax's partition "
    'metadata ({nn.PARTITION_NAME: "layers"}). Projection(rows=-2, cols=-1) '
    "confirms that the last two are a matrix.",
    stacklevel=4,  # the call of `init`, unless a wrapper is in between
  )


def _some(leaves: Iterable[str], limit: int = 8) -> str:
  names = [repr(path) for path in leaves]
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return (", ".join(names[:limit]) + more) or "none"
