"""When bases are recomputed, how, and what happens to the moments then."""

import dataclasses
from typing import Any, TypeGuard

import jax
from jax.typing import ArrayLike

from galore_optax import checks
from galore_optax.subspace import find
from galore_optax.subspace.adaptive import Adaptive

POLICIES = ("staggered", "synchronous", "adaptive")
MOMENTS = ("rotate", "keep", "reset", "ldadam")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Refresh:
  r"""When and how :func:`galore_optax.galore` recomputes its bases.

  A field that is None has the default of the optimizer it is given to. The
  defaults below are those of :func:`galore_optax.galore`; recipes list theirs.
  Where an optimizer takes `refresh`, the string `"synchronous"` is short for
  `Refresh(policy="synchronous")`.

  Attributes:
    policy: When bases are recomputed. `synchronous`: those of all matrices at
      the steps 0, T, 2T, ... `staggered` (the default): those of all matrices
      at step 0; after that each matrix is due once in T steps, and the matrices
      are due at evenly spaced steps, so that all steps take about the same
      time. `adaptive`: as `staggered`, but a matrix whose subspace has settled
      is refreshed less and less often (Q-GaLore). Under `staggered` and
      `adaptive`, a matrix whose gradient was zero or not finite at step 0
      keeps its initial basis until it is due again, up to T steps later.
    finder: How a basis is found. `subspace` (the default): by subspace
      iteration, starting from the last basis. `svd`: the leading singular
      vectors, exactly. `random`: drawn every T steps from a seed, and only the
      seed is stored; for `residual="apollo"` or `"apollo_mini"`.
    iterations: Subspace iterations of a refresh; 2 by default, 1 in a burst.
    burst: Number of successive steps that a refresh takes, each of which makes
      one subspace iteration with its own gradient,

      .. math::

        P_t = \mathrm{orth}(Y_t / \|Y_t\|_F + \epsilon P_{t-1}), \quad
          Y_t = G_t G_t^\top P_{t-1}

      A basis then follows the mean of a few gradients instead of one. All
      matrices are due at the first steps of a run too. None (the default): a
      refresh takes place within one step.
    moments: What happens to the moments at a refresh. `rotate` (the default):
      they are carried into the new basis by :math:`C = P_{new}^\top P_{old}`,
      :math:`\mu \leftarrow C \mu` and :math:`\nu \leftarrow (C \circ C) \nu`.
      `keep`: they stay as they are, as in the paper. `reset`: they become zero.
      `ldadam`, for an inner optimizer with `optax.scale_by_adam`: the second
      moment is carried over as a variance and a squared mean,

      .. math::

        \nu \leftarrow (1 - \beta_2^t) \left| (C \circ C)(\hat\nu - \hat\mu^2)
          + (C \hat\mu)^2 \right|

      with the bias-corrected moments after t steps.
    null_tolerance: Directions in which the projected gradient is smaller than
      this fraction of its norm are set to zero: they hold rounding noise, which
      Adam would scale up. 0 keeps all directions; the default is 1e-6.
    random_from: Step from which a refresh draws an orthonormal basis uniformly
      at random instead of finding one (GoLore); None for never. Late in
      training, gradients of small batches are mostly noise, and their leading
      directions are noise too; random bases miss nothing on average. First
      moments are still carried over; under `moments="rotate"` second moments
      stay as they are, because two random bases have little in common.
    adaptive: When a subspace counts as settled, for `policy="adaptive"`; by
      default as in Q-GaLore, see :class:`galore_optax.Adaptive`.
    share: Whether leaves whose bases have the same shape share one compiled
      refresh. Sharing compiles faster, but keeps the gradients of all those
      leaves alive until the last one is known. With False every leaf has its
      own; where layers are separate leaves, a compiler can then update each of
      them as soon as its gradient is known.

  Raises:
    ValueError: If a field is out of its range, or contradicts another.
    TypeError: If a field has the wrong type.

  Example:
    >>> import optax
    >>> from galore_optax import Refresh, galore
    >>> exact = Refresh(policy="synchronous", finder="svd")
    >>> exact
    Refresh(policy='synchronous', finder='svd')
    >>> tx = galore(optax.adam(1e-3), rank=16, refresh=exact)
    >>> Refresh.paper().moments
    'keep'

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024; for
    `policy="adaptive"` Zhang et al., `Q-GaLore
    <https://arxiv.org/abs/2407.08296>`_, 2024; for `moments="ldadam"` Robert
    et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024; for
    `random_from` He et al., `Subspace Optimization for Large Language Models
    with Convergence Guarantees <https://arxiv.org/abs/2410.11289>`_, 2024.
  """

  # Numbers may be traced: none of them decides a shape.
  policy: str | None = None
  finder: str | None = None
  iterations: ArrayLike | None = None
  moments: str | None = None
  null_tolerance: ArrayLike | None = None
  random_from: ArrayLike | None = None
  adaptive: Adaptive | None = None
  share: bool = True
  burst: ArrayLike | None = None

  def __post_init__(self):
    """Refuses values out of range, and fields that contradict each other."""
    checks.check_choice("policy", self.policy, POLICIES)
    checks.check_choice("finder", self.finder, find.METHODS)
    checks.check_choice("moments", self.moments, MOMENTS)
    _check_whole("iterations", self.iterations)
    _check_whole("burst", self.burst)
    checks.check_not_negative("null_tolerance", self.null_tolerance)
    checks.check_number("random_from", self.random_from)
    if not isinstance(self.share, bool):
      raise TypeError(f"`share` must be True or False, got {self.share!r}.")
    _check_burst(self)
    _check_adaptive(self)
    _check_random(self)
    _check_random_from(self)

  def __repr__(self) -> str:
    """The call that makes it, with the fields that differ from the defaults."""
    fields = (
      f"{field.name}={getattr(self, field.name)!r}"
      for field in dataclasses.fields(self)
      if getattr(self, field.name) is not field.default
    )
    return f"Refresh({', '.join(fields)})"

  @staticmethod
  def paper() -> "Refresh":
    """The refresh of the GaLore paper, which `faithful=True` selects."""
    return Refresh(
      policy="synchronous", finder="svd", moments="keep", null_tolerance=0.0
    )

  def or_defaults(self, defaults: "Refresh") -> "Refresh":
    """This refresh with the fields that are None taken from `defaults`."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    chosen = {k: v for k, v in fields.items() if v is not None}
    if self.burst is not None:
      chosen |= {"iterations": 1}
    return dataclasses.replace(defaults, **chosen)


def _is_traced(value: Any) -> TypeGuard[jax.core.Tracer]:
  return isinstance(value, jax.core.Tracer)


def _check_whole(name: str, number: Any) -> None:
  checks.check_positive(name, number)
  if number is None or _is_traced(number):
    return
  if number % 1:
    raise ValueError(f"`{name}` must be a whole number, got {number}.")


def _check_burst(refresh: Refresh) -> None:
  """Refuses what a refresh of several steps does not go with."""
  if refresh.burst is None:
    return
  if _is_traced(refresh.iterations) or refresh.iterations not in (None, 1):
    raise ValueError(
      "Each step of a `burst` makes one subspace iteration, got "
      f"iterations={refresh.iterations!r}. Leave it out, or make the burst "
      "longer."
    )
  reasons = {
    "policy": ("adaptive", "compares the bases of one step", "staggered"),
    "finder": ("svd", "needs no second step", "subspace"),
  }
  for name, (refused, why, works) in reasons.items():
    if getattr(refresh, name) == refused:
      raise ValueError(
        f"`burst` makes a refresh of several steps, and {name}={refused!r} "
        f"{why}. Leave out `burst`, or set {name}={works!r}."
      )
  if refresh.finder == "random" or refresh.random_from is not None:
    raise ValueError(
      "`burst` follows the gradients of several steps, which random bases do "
      "not. Leave one of the two out."
    )


def _check_adaptive(refresh: Refresh) -> None:
  adaptive = refresh.adaptive
  if adaptive is None:
    return
  if not isinstance(adaptive, Adaptive):
    raise TypeError(
      f"`adaptive` must be a galore_optax.Adaptive, got {adaptive!r}."
    )
  if refresh.policy not in (None, "adaptive"):
    raise ValueError(
      '`adaptive` is for policy="adaptive", got '
      f"policy={refresh.policy!r}. Leave one of the two out."
    )
  if adaptive.measure == "cosine" and refresh.finder not in (None, "svd"):
    raise ValueError(
      'measure="cosine" compares leading singular vectors, which only '
      f'finder="svd" computes, got finder={refresh.finder!r}. Use '
      'measure="overlap".'
    )


def _check_random(refresh: Refresh) -> None:
  if refresh.finder != "random":
    return
  if refresh.policy == "adaptive":
    raise ValueError(
      'finder="random" has no subspace that could settle, got '
      'policy="adaptive". Leave one of the two out.'
    )
  if refresh.moments in ("reset", "ldadam"):
    raise ValueError(
      'finder="random" keeps the moments when a basis is drawn, got '
      f"moments={refresh.moments!r}. Leave one of the two out."
    )


def _check_random_from(refresh: Refresh) -> None:
  if refresh.random_from is None:
    return
  for name, refused in (("finder", "random"), ("moments", "ldadam")):
    if getattr(refresh, name) == refused:
      raise ValueError(
        "`random_from` draws random bases from a step on, which "
        f"{name}={refused!r} does not go with. Leave one of the two out."
      )


# The defaults of `galore`.
DEFAULTS = Refresh(
  policy="staggered",
  finder="subspace",
  iterations=2,
  moments="rotate",
  null_tolerance=1e-6,
)


def complete(refresh: Refresh | str, defaults: Refresh = DEFAULTS) -> Refresh:
  """An optimizer's argument `refresh` with its defaults filled in.

  Args:
    refresh: A :class:`Refresh`, or the name of a policy.
    defaults: What fields that are None become.

  Returns:
    The refresh; a field is None only if it is None in `defaults` too.

  Raises:
    ValueError: If the name is unknown, or a field contradicts a default.
    TypeError: If it is neither.
  """
  if isinstance(refresh, str):
    checks.check_choice("refresh", refresh, POLICIES)
    refresh = Refresh(policy=refresh)
  if not isinstance(refresh, Refresh):
    raise TypeError(
      "`refresh` must be a galore_optax.Refresh or one of "
      f"{', '.join(map(repr, POLICIES))}, got {refresh!r}."
    )
  refresh = refresh.or_defaults(defaults)
  if refresh.policy == "adaptive" and refresh.adaptive is None:
    refresh = dataclasses.replace(refresh, adaptive=Adaptive())
  return refresh


def faithful(refresh: Refresh) -> Refresh:
  """The paper's refresh; raises if `refresh` asks for something else.

  Args:
    refresh: The argument with its defaults filled in. A value that is
      `galore`'s default counts as not given.

  Returns:
    :meth:`Refresh.paper`, with what the paper leaves open as it is.
  """
  paper = Refresh.paper()
  names = ("policy", "finder", "moments", "null_tolerance")
  fields = {name: getattr(paper, name) for name in names}
  for name, wanted in fields.items():
    value = getattr(refresh, name)
    if _is_traced(value) or value not in (getattr(DEFAULTS, name), wanted):
      raise ValueError(
        f"`faithful=True` means Refresh({name}={wanted!r}), got "
        f"{name}={value!r}. Leave one of the two out."
      )
  others = {
    "random_from": "draws random bases from a step on",
    "burst": "makes a refresh of several steps",
  }
  for name, does in others.items():
    if getattr(refresh, name) is not None:
      raise ValueError(
        f"`{name}` {does}, which faithful=True does not go with. Leave one of "
        "the two out."
      )
  return dataclasses.replace(refresh, **fields)
