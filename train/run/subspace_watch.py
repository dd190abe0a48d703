"""Measures how good a run's subspaces are, for a few matrices now and then.

A measurement of a matrix is logged as `subspace/MATRIX/NUMBER` in
metrics.jsonl. The numbers, for a gradient G, are:
  energy         |P'G|^2 / |G|^2, the share of the gradient's energy that is
                 kept by the basis P that the step projects with
  energy_before  the same for the basis before this step's refresh
  overlap        |P'P_old|^2 / r, the share of the old basis kept in the new
  stable_rank    |G|^2 / (largest singular value of G)^2
The second and the third are logged only where the step refreshed the matrix.

A measurement needs the gradient, which a step does not return. It takes about
the time of one more step and, as every layer is recomputed, little memory. So
measurements are rare, and other steps are not affected.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_optax
from train.common.errors import UserError
from train.config import schema
from train.methods import registry
from train.models import llama
from train.parallel import mesh
from train.step import losses as losses_lib
from train.step import state as state_lib
from train.step import train_step
from train.step.setup import Setup

# By default at most one step in this many measures something.
RARE = 50
MAX_MATRICES = 12


class Matrix(NamedTuple):
  """One layer of a stacked leaf that is projected."""

  path: str  # of the leaf: layers/attn/q/kernel
  layer: int
  index: int  # among all projected matrices, which decides its phase
  count: int  # of all projected matrices, experts' too

  @property
  def name(self) -> str:
    """Its name in the log: attn.q.3."""
    return f"{short_name(self.path)}.{self.layer}"


def short_name(path: str) -> str:
  """`attn.q` of `layers/attn/q/kernel`."""
  return ".".join(p for p in path.split("/") if p not in ("layers", "kernel"))


def matrices(description: galore_optax.diagnostics.Description) -> list[Matrix]:
  """The projected matrices of the blocks, in the sequence of refreshes.

  Those of experts are counted, but cannot be measured.
  """
  all_of_them = [
    (row, index)
    for row in description.rows
    if row.rank and len(row.shape) >= 3
    for index in np.ndindex(row.shape[:-2])
  ]
  return [
    Matrix(row.path, index[0], position, len(all_of_them))
    for position, (row, index) in enumerate(all_of_them)
    if len(index) == 1
  ]


def candidates(
  config: schema.OptimizerConfig,
  description: galore_optax.diagnostics.Description,
) -> tuple[list[Matrix], str]:
  """The matrices that can be measured, and if there are none, the reason."""
  method = registry.get(config.name)
  if method.unwatchable:
    return [], method.unwatchable
  known = matrices(description)
  return known, "" if known else "nothing is projected"


def choose(setting: str, known: list[Matrix], why_not: str) -> list[Matrix]:
  """The matrices that `run.watch` means.

  Args:
    setting: `auto` for a query matrix of the first layer and a feed-forward
      matrix each in the middle and at the end; `none`; or names or regular
      expressions of names, separated by commas: `attn.q.0,mlp.*.3`.
    known: all matrices that can be measured.
    why_not: the reason, if there are none.

  Raises:
    UserError: nothing can be measured, a name matches no matrix, or too many
      match.
  """
  if setting == "none" or (setting == "auto" and not known):
    return []
  if not known:
    raise UserError(
      f"run.watch={setting}: no matrix can be measured, because {why_not};"
      " leave run.watch at auto"
    )
  names = {matrix.name: matrix for matrix in known}
  if setting == "auto":
    last = max(matrix.layer for matrix in known)
    wanted = ("attn.q.0", f"mlp.up.{(last + 1) // 2}", f"mlp.down.{last}")
    return [names[name] for name in wanted if name in names] or known[:1]
  chosen: dict[str, Matrix] = {}
  for pattern in filter(None, map(str.strip, setting.split(","))):
    chosen |= _matching(pattern, names)
  if len(chosen) > MAX_MATRICES:
    raise UserError(
      f"run.watch={setting} matches {len(chosen)} matrices; at most"
      f" {MAX_MATRICES} can be watched"
    )
  return list(chosen.values())


def _matching(pattern: str, names: Mapping[str, Matrix]) -> dict[str, Matrix]:
  try:
    matching = {n: m for n, m in names.items() if re.fullmatch(pattern, n)}
  except re.error as error:
    raise UserError(
      f"run.watch: {pattern!r} is not a regular expression ({error})"
    ) from None
  if not matching:
    examples = ", ".join(list(names)[:: max(1, len(names) // 4)])
    raise UserError(
      f"run.watch: {pattern!r} matches no projected matrix; they have"
      f" names like {examples}"
    )
  return matching


class Before(NamedTuple):
  """What a measurement needs from before the step."""

  gradients: dict[str, jax.Array]  # name to (m, n)
  bases: dict[str, dict[str, jax.Array]]  # name to side to (m, r) or (n, r)


class Watcher:
  """Measures the chosen matrices, at steps that refresh one of them."""

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
      UserError: `run.watch` matches no matrix.
    """
    known, self.why_not = candidates(config, setup.plan)
    if known and not (known := _visible(known, setup.abstract.state)):
      self.why_not = "their bases are not kept layer by layer"
    self.matrices = choose(run.watch, known, self.why_not)
    self._model, self._config, self._parts = (
      setup.abstract.config,
      config,
      parts,
    )
    self._every = run.watch_every or self._period()
    where = mesh.replicated(setup.mesh)
    self._jit_before: Any = jax.jit(self._before, out_shardings=where)
    self._jit_after: Any = jax.jit(self._after, out_shardings=where)

  def _period(self) -> int:
    """Steps between two measurements of a matrix, by default."""
    gap = self._config.update_proj_gap
    return gap * math.ceil(RARE * len(self.matrices) / gap)

  def is_due(self, updates: int) -> bool:
    """Whether the step after `updates` updates measures something.

    Step 0 does, where every basis is new. After that it is one step a period
    for each matrix: one that refreshes it, if the period is a multiple of the
    gap.
    """
    if not self.matrices or updates == 0:
      return bool(self.matrices)
    gap, together = self._config.update_proj_gap, self._synchronous
    return any(
      (updates - (0 if together else m.index * gap // m.count)) % self._every
      == 0
      for m in self.matrices
    )

  @property
  def _synchronous(self) -> bool:
    method = registry.get(self._config.name)
    return method.steps_together(self._config.refresh)

  def compile(self, state: state_lib.TrainState, rows: Any) -> None:
    """Compiles ahead, so that the first measurement does not delay a step.

    Args:
      state: the arrays, or their shapes and shardings.
      rows: a batch (B, T + 1), or its shape and sharding.
    """
    if not self.matrices:
      return
    lowered = self._jit_before.lower(state.params, state.opt_state, rows)
    self._jit_before = lowered.compile()
    before = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      self._jit_before.out_info,
      self._jit_before.output_shardings,
    )
    self._jit_after = self._jit_after.lower(before, state.opt_state).compile()

  def programs(self) -> int:
    """Number of programs that calls compiled; those compiled ahead are none."""
    functions = (self._jit_before, self._jit_after)
    return sum(map(train_step.count_programs, functions))

  def before(self, state: state_lib.TrainState, rows: jax.Array) -> Before:
    """Gradients and bases of a state, before the step consumes it."""
    return self._jit_before(state.params, state.opt_state, rows)

  def after(
    self, before: Before, state: state_lib.TrainState
  ) -> dict[str, jax.Array]:
    """The numbers, from the bases that the step has used."""
    return self._jit_after(before, state.opt_state)

  def values(self, numbers: Mapping[str, Any]) -> dict[str, float]:
    """The numbers to log: without a refresh, `energy` and `stable_rank`."""
    plain = {name: float(x) for name, x in numbers.items()}
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

  def _before(self, params: dict, opt_state: Any, rows: jax.Array) -> Before:
    parts = mesh.microbatches(rows, self._parts)
    return Before(self._gradients(params, parts), self._bases(opt_state))

  def _after(self, before: Before, opt_state: Any) -> dict[str, jax.Array]:
    return compare(before, self._bases(opt_state))

  def _gradients(self, params: dict, parts: jax.Array) -> dict[str, jax.Array]:
    """Gradients summed over microbatches; only their direction matters."""
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
    """The parameters, dequantized."""
    return galore_optax.dequantize_params(params, self._model.dtype)

  def _loss(self, chosen: dict, params: dict, rows: jax.Array) -> jax.Array:
    """The summed loss as a function of the watched matrices alone."""
    config, length = self._model, rows.shape[1] - 1
    tokens = jnp.maximum(rows[:, :-1], 0)  # padding is negative

    def walk(x: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
      # Quantized weights are read one layer at a time, as in the step.
      layer = self._read(_slice(params["layers"], i))
      for m in self.matrices:
        here = jnp.where(i == m.layer, chosen[m.name], _leaf(layer, m.path[7:]))
        layer = _replace(layer, m.path[7:], here)
      return llama.block(config, layer, x, length, i)[0], None

    x = llama.embed(config, params, tokens)
    x, _ = jax.lax.scan(jax.checkpoint(walk), x, jnp.arange(config.n_layers))
    logits = llama.head(config, params, x, len(rows))
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, jnp.maximum(rows[:, 1:], 0)
    )
    return jnp.where(losses_lib.is_predicted(rows), losses, 0).sum()

  def _bases(self, opt_state: Any) -> dict[str, dict[str, jax.Array]]:
    """The bases of the watched matrices."""
    if isinstance(opt_state, galore_optax.LayerwiseState):
      return {m.name: _bases_of_layer(opt_state, m) for m in self.matrices}
    found = galore_optax.find_bases(opt_state)
    return {
      m.name: {side: x[m.layer] for side, x in found[m.path].items()}
      for m in self.matrices
    }


def _bases_of_layer(
  state: galore_optax.LayerwiseState, matrix: Matrix
) -> dict[str, jax.Array]:
  """The bases of a matrix, of which only its layer is copied to the device."""
  layer = jax.tree.map(lambda x: x[matrix.layer], state.layers)
  return galore_optax.find_bases(mesh.on_device(layer))[matrix.path]


def _visible(known: list[Matrix], state: state_lib.TrainState) -> list[Matrix]:
  """The matrices whose bases are kept layer by layer in the state."""
  bases = jax.eval_shape(galore_optax.find_bases, state.opt_state)
  return [
    m
    for m in known
    if m.path in bases
    and all(m.layer < x.shape[0] for x in bases[m.path].values())
  ]


def compare(
  before: Before, bases: Mapping[str, Mapping[str, jax.Array]]
) -> dict[str, jax.Array]:
  """The numbers of a measurement, and as `refreshed` whether a basis changed.

  Args:
    before: gradients and bases from before the step.
    bases: from after it.
  """
  found = {}
  for name, g in before.gradients.items():
    old, new = before.bases[name], bases[name]
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
  """One layer of a stacked leaf; of a quantized one, its codes and scales."""
  return jax.tree.map(lambda x: x[i], stacked)


def _leaf(tree: Any, path: str) -> Any:
  for key in path.split("/"):
    tree = tree[key]
  return tree


def _replace(tree: dict, path: str, leaf: Any) -> dict:
  """A copy of nested dicts in which one leaf is replaced."""
  key, _, rest = path.partition("/")
  return tree | {key: _replace(tree[key], rest, leaf) if rest else leaf}
