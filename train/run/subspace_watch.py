"""How good a run's subspaces are: a look at a few matrices now and then.

A look at a matrix gives, as `subspace/MATRIX/NUMBER` in metrics.jsonl:
  energy         the share of the gradient's energy that the basis keeps with
                 which the step projects, |P'G|^2 / |G|^2
  energy_before  the same with the basis before this step's refresh
  overlap        what is left of the old basis in the new, |P'P_old|^2 / r
  stable_rank    of the gradient, |G|^2 / its largest singular value squared
The second and third are there where the step has refreshed the matrix.

A look needs the gradient, which a step does not hand out: it costs about one
more step's time and, as every layer is recomputed, little memory. So looks
are rare; the other steps are not touched.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import galore_optax
from train.common.errors import UserError
from train.config import schema
from train.methods import table as methods
from train.models import llama
from train.parallel import mesh
from train.step import train_step
from train.step.setup import Setup

# At most one step in so many is looked at by default.
RARE = 50
MOST = 12  # matrices


class Matrix(NamedTuple):
  """One layer's slice of a stacked, projected leaf."""

  path: str  # of the leaf: layers/attn/q/kernel
  layer: int
  number: int  # among all projected matrices, which decides its turn
  count: int  # of all projected matrices

  @property
  def name(self) -> str:
    """Its name in the log: attn.q.3."""
    return f"{short_name(self.path)}.{self.layer}"


def short_name(path: str) -> str:
  """`attn.q` of `layers/attn/q/kernel`."""
  return ".".join(p for p in path.split("/") if p not in ("layers", "kernel"))


def matrices(description: galore_optax.diagnostics.Description) -> list[Matrix]:
  """All projected matrices of the blocks, in the order of their refreshes."""
  found = [
    (row.path, layer)
    for row in description.rows
    if row.rank and len(row.shape) == 3
    for layer in range(row.shape[0])
  ]
  return [Matrix(*x, i, len(found)) for i, x in enumerate(found)]


def candidates(
  config: schema.OptimizerConfig,
  description: galore_optax.diagnostics.Description,
) -> tuple[list[Matrix], str]:
  """The matrices whose subspace says something, and if there is none why."""
  method = methods.get(config.name)
  if method.unwatchable:
    return [], method.unwatchable
  known = matrices(description)
  return known, "" if known else "nothing is projected"


def choose(setting: str, known: list[Matrix], why_not: str) -> list[Matrix]:
  """The matrices that `run.watch` means.

  Args:
    setting: `auto`: a query of the first layer, a feed-forward matrix in the
      middle and one at the end; `none`; or names or regular expressions of
      names, separated by commas: `attn.q.0,mlp.*.3`.
    known: all projected matrices that can be looked at.
    why_not: the reason, if there is none.

  Raises:
    UserError: nothing is projected, a name fits none, or too many fit.
  """
  if setting == "none" or (setting == "auto" and not known):
    return []
  if not known:
    raise UserError(
      f"run.watch={setting}: there is no matrix to look at,"
      f" {why_not}; leave run.watch at auto"
    )
  names = {matrix.name: matrix for matrix in known}
  if setting == "auto":
    last = max(matrix.layer for matrix in known)
    wanted = ("attn.q.0", f"mlp.up.{(last + 1) // 2}", f"mlp.down.{last}")
    return [names[name] for name in wanted if name in names] or known[:1]
  chosen: dict[str, Matrix] = {}
  for pattern in filter(None, map(str.strip, setting.split(","))):
    chosen |= _matching(pattern, names)
  if len(chosen) > MOST:
    raise UserError(
      f"run.watch={setting} fits {len(chosen)} matrices; at most {MOST} can"
      " be watched"
    )
  return list(chosen.values())


def _matching(pattern: str, names: Mapping[str, Matrix]) -> dict[str, Matrix]:
  try:
    hits = {n: m for n, m in names.items() if re.fullmatch(pattern, n)}
  except re.error as error:
    raise UserError(
      f"run.watch: {pattern!r} is no regular expression ({error})"
    ) from None
  if not hits:
    some = ", ".join(list(names)[:: max(1, len(names) // 4)])
    raise UserError(
      f"run.watch: {pattern!r} fits no projected matrix; they have names"
      f" like {some}"
    )
  return hits


class Look(NamedTuple):
  """What a look keeps from before the step."""

  gradients: dict[str, jax.Array]  # name to (m, n)
  bases: dict[str, dict[str, jax.Array]]  # name to side to (m, r) or (n, r)


class Watcher:
  """Looks at the watched matrices, at steps that refresh one of them."""

  def __init__(
    self,
    run: schema.RunConfig,
    config: schema.OptimizerConfig,
    setup: Setup,
    parts: int = 1,
  ):
    """Chooses the matrices.

    Args:
      run: which matrices, and how often.
      config: how they are projected.
      setup: the model and its optimizer.
      parts: of a batch whose gradients are added up.

    Raises:
      UserError: `run.watch` fits no matrix.
    """
    known, self.why_not = candidates(config, setup.plan)
    if known and not (known := _visible(known, setup.placed.state)):
      self.why_not = "their bases are not kept layer by layer"
    self.matrices = choose(run.watch, known, self.why_not)
    self._model, self._config, self._parts = setup.placed.config, config, parts
    self._every = run.watch_every or self._period()
    where = mesh.replicated(setup.mesh)
    self._first: Any = jax.jit(self._before, out_shardings=where)
    self._second: Any = jax.jit(self._after, out_shardings=where)

  def _period(self) -> int:
    """Steps between two looks at one matrix, by default."""
    gap = self._config.update_proj_gap
    return gap * math.ceil(RARE * len(self.matrices) / gap)

  def is_due(self, updates: int) -> bool:
    """Whether the step after `updates` updates is to be looked at.

    Those are step 0, where every basis is new, and from then on one step in
    the period for each matrix: that of a refresh, if the period is a multiple
    of the gap.
    """
    if not self.matrices or updates == 0:
      return bool(self.matrices)
    gap, together = self._config.update_proj_gap, self._synchronous
    return any(
      (updates - (0 if together else m.number * gap // m.count)) % self._every
      == 0
      for m in self.matrices
    )

  @property
  def _synchronous(self) -> bool:
    method = methods.get(self._config.name)
    return method.steps_together(self._config.refresh)

  def compile(self, state: train_step.TrainState, rows: Any) -> None:
    """Compiles the looks ahead, so that the first one holds up no step.

    Args:
      state: the arrays, or their shapes and shardings.
      rows: a batch (B, T + 1), or its shape and sharding.
    """
    if not self.matrices:
      return
    first = self._first.lower(state.params, state.opt_state, rows)
    self._first = first.compile()
    look = jax.tree.map(
      lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
      self._first.out_info,
      self._first.output_shardings,
    )
    self._second = self._second.lower(look, state.opt_state).compile()

  def programs(self) -> int:
    """Programs that looks have compiled so far, none if that was done ahead."""
    return sum(map(train_step.count_programs, (self._first, self._second)))

  def before(self, state: train_step.TrainState, rows: jax.Array) -> Look:
    """Keeps gradients and bases of the state that the step will consume."""
    return self._first(state.params, state.opt_state, rows)

  def after(
    self, look: Look, state: train_step.TrainState
  ) -> dict[str, jax.Array]:
    """The numbers of a look, with the bases that the step has used."""
    return self._second(look, state.opt_state)

  def values(self, found: Mapping[str, Any]) -> dict[str, float]:
    """The numbers as they are logged: those of no refresh left out."""
    plain = {name: float(x) for name, x in found.items()}
    refreshed = {
      f"subspace/{m.name}/"
      for m in self.matrices
      if plain.pop(f"subspace/{m.name}/refreshed")
    }
    return {
      name: value
      for name, value in plain.items()
      if not name.endswith(("/overlap", "/energy_before"))
      or name.rpartition("/")[0] + "/" in refreshed
    }

  def _before(self, params: dict, opt_state: Any, rows: jax.Array) -> Look:
    parts = mesh.microbatches(rows, self._parts)
    return Look(self._gradients(params, parts), self._bases(opt_state))

  def _after(self, look: Look, opt_state: Any) -> dict[str, jax.Array]:
    return compare(look, self._bases(opt_state))

  def _gradients(self, params: dict, parts: jax.Array) -> dict[str, jax.Array]:
    """Summed over the microbatches; only their direction matters here."""
    chosen = {
      m.name: self._read(_slice(_leaf(params, m.path), m.layer))
      for m in self.matrices
    }
    differentiate = jax.grad(self._loss)

    def add(total: dict, part: jax.Array) -> tuple[dict, None]:
      return optax.tree.add(total, differentiate(chosen, params, part)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), chosen)
    return jax.lax.scan(add, zeros, parts)[0]

  def _read(self, params: Any) -> Any:
    """The weights that parameters stand for, none of them quantised."""
    return galore_optax.dequantize_params(params, self._model.dtype)

  def _loss(self, chosen: dict, params: dict, rows: jax.Array) -> jax.Array:
    """The summed loss as a function of the watched matrices alone."""
    config, length = self._model, rows.shape[1] - 1
    tokens = jnp.maximum(rows[:, :-1], 0)  # padding is no id

    def walk(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
      # Weights in few bits are read a layer at a time, as in the step.
      layer = self._read(_slice(params["layers"], i))
      for m in self.matrices:
        here = jnp.where(i == m.layer, chosen[m.name], _leaf(layer, m.path[7:]))
        layer = _replace(layer, m.path[7:], here)
      return llama.block(config, layer, x, length), None

    x = llama.embed(config, params, tokens)
    x, _ = jax.lax.scan(jax.checkpoint(walk), x, jnp.arange(config.n_layers))
    logits = llama.head(config, params, x, len(rows))
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, jnp.maximum(rows[:, 1:], 0)
    )
    return jnp.where(train_step.is_predicted(rows), losses, 0).sum()

  def _bases(self, opt_state: Any) -> dict[str, dict[str, jax.Array]]:
    """The bases of the watched matrices."""
    found = galore_optax.find_bases(opt_state)
    return {
      m.name: {side: x[m.layer] for side, x in found[m.path].items()}
      for m in self.matrices
    }


def _visible(known: list[Matrix], state: train_step.TrainState) -> list[Matrix]:
  """Those whose bases a look finds layer by layer."""
  bases = jax.eval_shape(galore_optax.find_bases, state.opt_state)
  return [
    m
    for m in known
    if m.path in bases
    and all(m.layer < x.shape[0] for x in bases[m.path].values())
  ]


def compare(
  look: Look, bases: Mapping[str, Mapping[str, jax.Array]]
) -> dict[str, jax.Array]:
  """The numbers of a look; `refreshed` says whether the basis has changed."""
  found = {}
  for name, g in look.gradients.items():
    old, new = look.bases[name], bases[name]
    changed = [jnp.any(new[side] != old[side]) for side in new]
    found |= {
      f"subspace/{name}/energy": galore_optax.captured_energy(g, new),
      f"subspace/{name}/energy_before": galore_optax.captured_energy(g, old),
      f"subspace/{name}/overlap": galore_optax.basis_overlap(new, old),
      f"subspace/{name}/stable_rank": galore_optax.stable_rank(g),
      f"subspace/{name}/refreshed": jnp.any(jnp.stack(changed)),
    }
  return found


def _slice(stacked: Any, i: Any) -> Any:
  """One layer of what is stacked, codes and scales among it."""
  return jax.tree.map(lambda x: x[i], stacked)


def _leaf(tree: Any, path: str) -> Any:
  for key in path.split("/"):
    tree = tree[key]
  return tree


def _replace(tree: dict, path: str, leaf: Any) -> dict:
  """The nested dicts with one leaf replaced."""
  key, _, rest = path.partition("/")
  return tree | {key: _replace(tree[key], rest, leaf) if rest else leaf}
