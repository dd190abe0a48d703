r"""The residual divided by its own size, and added to the update.

GaLore drops the part of a gradient that its basis P does not span, :math:`S = G
- P R`. Here it takes part in the update. It has no momentum; it is divided by
the root of a running mean of its squares, kept for each column, or for columns
and rows. So it moves the weights at Adam's rate, and the state grows by a
vector for each matrix. How fast its norm grows from step to step can be
limited, as in Fira.

For one column, the squares of S are those of G without those of R, because P is
orthonormal. The column form therefore never computes S: it is folded into the
product that lifts the update,

.. math::

  P N + \mathrm{factor} \cdot S D = P (N - \mathrm{factor} \cdot R D)
    + \mathrm{factor} \cdot G D
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_optax import linalg
from galore_optax.residual import limiter
from galore_optax.residual.step import Settings, Step
from galore_optax.subspace import projection
from galore_optax.tree import matrix_view, plan, sharding, slices

METHODS = ("normalized", "factored")

FACTOR, DECAY = 1.0, 0.95

# A residual whose squares are below this fraction of the gradient's is rounding
# noise: the identity above subtracts two numbers of float32, and bases are
# orthonormal up to 1e-5. Divided by its own size, noise would become as large
# as a step. (Projected gradients in few bits are noisier, see `lift_leaf`.)
_NOISE = 1e-4


class State(NamedTuple):
  """Running means of the squares of one leaf's residual.

  They start at zero and are divided by `weight`, which removes the bias.

  Attributes:
    columns: Of the sum over each column (of each row, if the right side alone
      is projected): (..., n) or (..., m), float32. The columns of a tensor are
      along the axis that a rule names last, and its rows along all others.
    rows: For `factored`, of the sum over each row (column): (..., m) or
      (..., n), float32. Otherwise None.
    weight: Sum of the weights of all steps in the means, (...), float32.
    norm: Norm of the last normalized residual, (...), float32; None if it may
      grow at will.
  """

  columns: Any
  rows: Any
  weight: Any
  norm: Any


def start(settings: Settings, site: plan.Site, like: Any) -> State:
  """The state before the first step: zero.

  Args:
    settings: The method and its numbers.
    site: The leaf's plan.
    like: The parameter; the means are sharded like its rows and columns.

  Returns:
    The state.
  """
  view = _columns_of(site) if site.is_tensor else site.matrix

  def zeros(*axes: int) -> jax.Array:
    shape = (*view.stack, *(view.dims[k] for k in axes))

    def spec(parts: tuple) -> tuple:
      parts = view.spec(parts)
      return (*parts[:-2], *(parts[k] for k in axes))

    return sharding.shard_like(jnp.zeros(shape, jnp.float32), like, spec)

  kept, reduced = (-2, -1) if _is_right(site) else (-1, -2)
  return State(
    columns=zeros(kept),
    rows=zeros(reduced) if settings.method == "factored" else None,
    weight=zeros(),
    norm=zeros() if settings.is_limited else None,
  )


def _columns_of(site: plan.Site) -> matrix_view.MatrixView:
  """A leaf of tensors as matrices: its columns, and all other axes as rows."""
  view: Any = site.view
  column = view.axes[view.factored[-1]]
  rows = tuple(axis for axis in view.axes if axis != column)
  return matrix_view.MatrixView(view.shape, view.batch, rows, (column,))


def _is_right(site: plan.Site) -> bool:
  """Whether only the right side is projected; then rows take columns' part."""
  return site.sides == ("right",)


def lift_leaf(
  settings: Settings, step: Step, state: State
) -> tuple[jax.Array, State]:
  r"""One leaf's update at full size, with the normalized residual in it.

  With the inner optimizer's direction N, the residual S of the gradient G, and
  bias-corrected running means :math:`\hat c_j` of :math:`\sum_i S_{ij}^2` and
  :math:`\hat w_i` of :math:`\sum_j S_{ij}^2`, the update is

  .. math::

    \alpha (P N + \mathrm{factor} \cdot \tilde S), \quad
    \tilde S_{ij} = S_{ij} \sqrt{\frac{m - r}{\hat c_j}}
    \quad \text{or} \quad \tilde S_{ij} =
    S_{ij} \sqrt{\frac{\sum_k \hat w_k}{\hat c_j \hat w_i}}

  for `normalized` or `factored` (the left side). With a limit,
  :math:`\tilde S` is then scaled down wherever its norm is more than `growth`
  times the last one.

  A matrix whose gradient is not finite has no residual in this step, and leaves
  its state as it is.

  Args:
    settings: The method and its numbers.
    step: The leaf's arrays.
    state: The state before the step.

  Returns:
    Updates (..., m, n), and the state after the step.
  """
  site = step.site
  factor = FACTOR if settings.factor is None else settings.factor
  gain = 1.0 if step.gain is None else step.gain
  run = _Matrices(
    factored=settings.method == "factored",
    orthonormal=settings.orthonormal,
    site=site,
    rate=factor * site.scale * jnp.asarray(gain, jnp.float32),
    decay=DECAY if settings.decay is None else settings.decay,
    growth=settings.growth,
    lift_dtype=step.grad.dtype if step.grad.dtype == jnp.bfloat16 else None,
    noise=max(_NOISE, 2 * float(jnp.finfo(step.low.dtype).eps)),
  )
  arrays = (step.grad, step.low, site.scale * step.new, step.bases, state)
  if not site.one_by_one:
    return run(*arrays)
  return slices.map_stack(run, len(site.view.stack), *arrays)


@dataclasses.dataclass(frozen=True)
class _Matrices:
  """What the matrices of a leaf have in common.

  Attributes:
    factored: Whether rows are normalized, too.
    orthonormal: Whether bases in float32 are orthonormal.
    site: The leaf's plan.
    rate: Factor on the normalized residual, signed: that of the update.
    decay: Decay of the means.
    growth: Largest ratio of the norms of a residual at two successive steps;
      None if that is not limited.
    lift_dtype: Dtype of the operands of the lift; None for float32.
    noise: Fraction of a column's squares below which its residual is noise.
  """

  factored: bool
  orthonormal: bool
  site: plan.Site
  rate: Any
  decay: Any
  growth: Any
  lift_dtype: Any
  noise: float

  def __call__(
    self,
    grad: jax.Array,
    low: jax.Array,
    new: jax.Array,
    bases: projection.Bases,
    state: State,
  ) -> tuple[jax.Array, State]:
    """The updates of some matrices, and their state after the step."""
    given, wide = grad, jnp.promote_types(grad.dtype, jnp.float32)
    grad, low = grad.astype(wide), low.astype(wide)
    if self.site.is_tensor:
      return self._of_tensors(grad, low, new, bases, state)
    if len(bases) == 2:
      # The right basis is applied to the small matrices; what is left of the
      # problem is the left side's.
      right = {"right": bases["right"]}
      low, new = projection.lift(low, right), projection.lift(new, right)
      image = projection.project(grad, {"left": bases["left"]})
      bases = {"left": bases["left"]}
    else:
      image = low
    axis = -1 if "right" in bases else -2
    if self.factored:
      rest = grad - projection.lift(low, bases)
      added, state = self._factored(grad, rest, state, axis)
      return self._lift(new, bases) + added, state
    return self._by_column(given, low, image, new, bases, state, axis)

  def _of_tensors(
    self,
    grad: jax.Array,
    low: jax.Array,
    new: jax.Array,
    bases: projection.Bases,
    state: State,
  ) -> tuple[jax.Array, State]:
    """The same for tensors, whose residual itself is computed."""
    view: Any = self.site.view
    stack, column = grad.ndim - len(view.dims), view.factored[-1]
    to_end = lambda x: jnp.moveaxis(x, stack + column, -1)
    rest = grad - projection.lift(low, bases)
    shape = to_end(rest).shape
    as_matrices = lambda x: to_end(x).reshape(*shape[:stack], -1, shape[-1])
    form = self._factored if self.factored else self._of_columns
    added, state = form(as_matrices(grad), as_matrices(rest), state, -2)
    added = jnp.moveaxis(added.reshape(shape), -1, stack + column)
    return self._lift(new, bases) + added, state

  def _of_columns(
    self, grad: jax.Array, rest: jax.Array, state: State, axis: int
  ) -> tuple[jax.Array, State]:
    """The column form where the residual itself is known."""
    whole, outside = jnp.sum(grad * grad, axis), jnp.sum(rest * rest, axis)
    scale, is_finite, state = self._scale(whole, outside, state, axis)
    return jnp.where(is_finite[..., None, None], rest * scale, 0), state

  def _scale(
    self, whole: jax.Array, outside: jax.Array, state: State, axis: int
  ) -> tuple[jax.Array, jax.Array, State]:
    """The factor on each column of the residual.

    Args:
      whole: Sums of squares of the gradient along `axis`.
      outside: Those of the residual.
      state: The state before the step.
      axis: The axis of the rows, or of the columns.

    Returns:
      Factors to multiply the residual by, whether the gradient is finite, and
      the state after the step.
    """
    energy, is_finite = _energy(whole, outside, self.noise)
    state = self._decayed(state, is_finite, energy, None)
    scale = jnp.sqrt(self._freedom(axis)) * _inverse_root(
      state.columns / _weight(state)[..., None], energy > 0
    )
    excess, state = self._limit(jnp.sum(scale * scale * energy, -1), state)
    scale = scale / excess[..., None]
    return jnp.expand_dims(scale * self.rate, axis), is_finite, state

  def _by_column(
    self,
    grad: jax.Array,
    low: jax.Array,
    image: jax.Array,
    new: jax.Array,
    bases: projection.Bases,
    state: State,
    axis: int,
  ) -> tuple[jax.Array, State]:
    """The column form, which needs no product but the lift."""
    wide = grad.astype(low.dtype)
    whole = jnp.sum(wide * wide, axis)
    inside = self._inside(low, image, bases, axis)
    scale, is_finite, state = self._scale(whole, whole - inside, state, axis)
    lifted = self._lift(new - low * scale, bases)
    finite = is_finite[..., None, None]
    add = lambda grad: (
      lifted + jnp.where(finite, grad.astype(low.dtype) * scale, 0)
    )
    if self.lift_dtype is None:
      return add(grad), state
    # Else compilers share the conversion of the gradient with the sum of
    # squares, leave that of the update out, and keep those of all leaves in
    # float32.
    update = add(jax.lax.optimization_barrier(grad)).astype(self.lift_dtype)
    return jax.lax.optimization_barrier(update), state

  def _factored(
    self,
    grad: jax.Array,
    rest: jax.Array,
    state: State,
    axis: int,
  ) -> tuple[jax.Array, State]:
    """The factored form: its rows differ, so it needs the residual itself."""
    other = -3 - axis
    whole = jnp.sum(grad * grad, axis)
    square = rest * rest
    energy, is_finite = _energy(whole, jnp.sum(square, axis), self.noise)
    kept = jnp.expand_dims(energy > 0, axis)
    of_rows = jnp.sum(jnp.where(kept, square, 0), other)
    state = self._decayed(state, is_finite, energy, of_rows)
    weight = _weight(state)[..., None]
    columns, rows = state.columns / weight, state.rows / weight
    rows = rows / jnp.maximum(jnp.sum(rows, -1, keepdims=True), _TINY)
    scale = jnp.expand_dims(_inverse_root(columns, energy > 0), axis)
    scale *= jnp.expand_dims(_inverse_root(rows, rows > 0), other)
    rest = jnp.where(is_finite[..., None, None], rest * scale, 0)
    excess, state = self._limit(jnp.sum(rest * rest, (-2, -1)), state)
    return rest * (self.rate / excess[..., None, None]), state

  def _limit(self, square: jax.Array, state: State) -> tuple[jax.Array, State]:
    """What normalized residuals of these squared norms are divided by."""
    if state.norm is None:
      return jnp.ones_like(square), state
    excess, norm = limiter.limit(limiter.root(square), state.norm, self.growth)
    return excess, state._replace(norm=norm)

  def _inside(
    self,
    low: jax.Array,
    image: jax.Array,
    bases: projection.Bases,
    axis: int,
  ) -> jax.Array:
    r"""What the squares of a column of S are smaller by than those of G.

    :math:`\|G_j - P B_j\|^2 = \|G_j\|^2 - (2 B_j^\top P^\top G_j - B_j^\top
    P^\top P B_j)`. With one orthonormal basis the difference is
    :math:`\|R_j\|^2`. A basis in few bits is not orthonormal, and on two sides
    B is not the projection of G.
    """
    (basis,) = bases.values()
    if low is image and self._is_orthonormal(basis):
      return jnp.sum(low * low, axis)
    gram = linalg.matmul("...mr,...ms->...rs", basis, basis)
    if axis == -2:
      through = linalg.matmul("...rs,...sn->...rn", gram, low)
    else:
      through = linalg.matmul("...ms,...sr->...mr", low, gram)
    return jnp.sum(low * (2 * image - through), axis)

  def _is_orthonormal(self, basis: jax.Array) -> bool:
    return self.orthonormal and basis.dtype == jnp.float32

  def _freedom(self, axis: int) -> float:
    """Dimensions that a column of the residual has, on average."""
    dims = self.site.view.dims
    core = self.site.low_shape[len(self.site.view.stack) :]
    free = math.prod(dims) - math.prod(core)
    if self.site.is_tensor:
      return free / _columns_of(self.site).n
    return free / dims[1 if axis == -2 else 0]

  def _decayed(
    self,
    state: State,
    is_finite: jax.Array,
    columns: jax.Array,
    rows: jax.Array | None,
  ) -> State:
    """The means with those of this step in them."""

    def mean(old: jax.Array, x: jax.Array) -> jax.Array:
      new = self.decay * old + (1 - self.decay) * x
      finite = jnp.expand_dims(is_finite, range(is_finite.ndim, old.ndim))
      return jnp.where(finite, new, old).astype(old.dtype)

    return State(
      mean(state.columns, columns),
      None if rows is None else mean(state.rows, rows),
      mean(state.weight, jnp.ones_like(state.weight)),
      state.norm,
    )

  def _lift(self, low: jax.Array, bases: projection.Bases) -> jax.Array:
    """Lifts; in bfloat16 if the update will be rounded to it anyway."""
    if self.lift_dtype is None:
      return projection.lift(low, bases)
    low, bases = jax.tree.map(lambda x: x.astype(self.lift_dtype), (low, bases))
    lifted = projection.lift(low, bases).astype(self.lift_dtype)
    # Without it compilers leave the rounding out, and keep what is lifted of
    # all leaves in float32 until it is added to residuals.
    return jax.lax.optimization_barrier(lifted)


_TINY = float(jnp.finfo(jnp.float32).tiny)


def _energy(
  whole: jax.Array, outside: jax.Array, noise: float
) -> tuple[jax.Array, jax.Array]:
  """Squares of the residual's columns, and which matrices are finite.

  Args:
    whole: Sum of the squares of each column of the gradient, (..., n).
    outside: The same of the residual.
    noise: Fraction of `whole` below which `outside` is rounding noise.

  Returns:
    `outside`, with 0 where it is noise or not finite, and bool (...).
  """
  is_finite = jnp.isfinite(jnp.sum(whole, -1))
  is_signal = (outside > noise * whole) & is_finite[..., None]
  return jnp.where(is_signal, outside, 0), is_finite


def _weight(state: State) -> jax.Array:
  """The sum of weights, or 1 before the first step."""
  return jnp.where(state.weight > 0, state.weight, 1)


def _inverse_root(x: jax.Array, where: jax.Array) -> jax.Array:
  """1 / √x, and 0 outside of `where` and where x is 0."""
  where &= x > _TINY
  return jnp.where(where, jax.lax.rsqrt(jnp.where(where, x, 1)), 0)
