"""Training with gradients at rank r beside AdamW and GaLore with whole ones.

Measured are the gradient pass and the whole training step of a LLaMA (gradient,
norm, update, new weights), in alternation. The FLOPs of the steps of the
papers' sizes are counted in the traced programs, without a refresh.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import galore_optax
from train.config import presets, schema
from train.estimate import jaxpr_cost
from train.measure import tables as tables_lib
from train.measure import timing
from train.measure.tables import short
from train.parallel import mesh as mesh_lib
from train.step import losses as losses_lib
from train.step import setup as setup_lib
from train.step import state as state_lib
from train.step import train_step

# Name to method, and whether gradients are at rank r.
WAYS = {
  "AdamW": ("adamw", False),
  "GaLore": ("galore", False),
  "GaLore, lean": ("galore", True),
}
SIZES = ("llama_60m", "llama_350m", "llama_1b", "llama_7b")
ROWS = 256  # of a batch; of 256 tokens each in the presets of these sizes


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options of this benchmark."""
  add = parser.add_argument
  add("--d-model", type=int, default=512, help="width (default: %(default)s)")
  add("--d-ff", type=int, default=1376, help="of the feed-forward layers")
  add("--layers", type=int, default=8, help="default: %(default)s")
  add("--vocab", type=int, default=4096, help="default: %(default)s")
  add("--rank", type=int, default=128, help="default: %(default)s")
  add("--rows", type=int, default=8, help="of a batch (default: %(default)s)")
  add("--length", type=int, default=256, help="tokens a row")
  add("--dtype", default="float32", help="of weights and activations")
  add("--rounds", type=int, default=15, help="how often each is timed")


QUICK = {"d_model": 64, "d_ff": 160, "layers": 2, "rank": 16, "rows": 2}


def measure(flags: argparse.Namespace) -> dict[str, Any]:
  """Median seconds of passes and steps, and FLOPs of the papers' sizes."""
  runs = {name: _Run(flags, *way) for name, way in WAYS.items()}
  budget = timing.Budget(flags.rounds, min(3, flags.rounds), 120)
  results = {
    "passes": _medians({k: run.gradient for k, run in runs.items()}, budget),
    "steps": _medians({k: run.step for k, run in runs.items()}, budget),
    "temporaries": {k: run.temporaries for k, run in runs.items()},
    "flops": {} if flags.quick else {size: _flops(size) for size in SIZES},
  }
  print(text(results))
  return results


def _medians(
  runs: dict[str, Callable[[], Any]], budget: timing.Budget
) -> dict[str, dict[str, float]]:
  """Median seconds, and the median ratio to the first within a round."""
  times = timing.interleave(runs, budget)
  first = times[next(iter(times))]
  return {
    name: {
      "seconds": statistics.median(values),
      "ratio": statistics.median(
        a / b for a, b in zip(values, first, strict=False)
      ),
    }
    for name, values in times.items()
  }


class _Run:
  """A training step and its gradient pass, compiled, with their state."""

  def __init__(self, flags: argparse.Namespace, method: str, lean: bool):
    config = configure(flags, method, lean)
    mesh = mesh_lib.make_mesh(config.mesh, config.data.batch)
    with jax.set_mesh(mesh):
      setup = setup_lib.make(config, mesh)
      self._state = state_lib.init_state(setup.tx, setup.abstract, 0)
      ids = np.random.default_rng(0).integers(
        0, flags.vocab, (flags.rows, flags.length + 1)
      )
      self._rows = jnp.asarray(ids, jnp.int32)
      step: Any = train_step.make_train_step(
        setup.tx, setup.abstract, config.train
      )
      self._step = step.lower(self._state, self._rows).compile()
      # Refreshes are measured as a part of steps.
      state = state_lib.init_state(setup.tx, setup.abstract, 0)
      self._pass = _gradient_pass(config, setup, state, self._rows)
    self.temporaries = self._step.memory_analysis().temp_size_in_bytes

  def gradient(self) -> Any:
    """One gradient pass."""
    return self._pass()

  def step(self) -> Any:
    """One training step."""
    self._state, metrics = self._step(self._state, self._rows)
    return metrics


def configure(
  flags: argparse.Namespace, method: str, lean: bool
) -> schema.Config:
  """The run of a method with the sizes that the flags name."""
  config = presets.make("llama_60m", method)
  config = presets.lean(config) if lean else config
  fields = {
    "model.d_model": flags.d_model,
    "model.d_ff": flags.d_ff,
    "model.n_layers": flags.layers,
    "model.vocab_size": flags.vocab,
    "model.dtype": flags.dtype,
    "model.param_dtype": flags.dtype,
    "optimizer.rank": flags.rank,
    "optimizer.clip": 1.0,
    "data.batch": flags.rows,
    "data.length": flags.length,
  }
  return schema.override(config, [f"{k}={v}" for k, v in fields.items()])


def _gradient_pass(
  config: schema.Config,
  setup: setup_lib.Setup,
  state: state_lib.TrainState,
  rows: jax.Array,
) -> Callable[[], Any]:
  """A compiled gradient pass at a step without a refresh."""
  loss = losses_lib.next_token_loss(setup.abstract, config.train)
  if config.train.lean:
    run = galore_optax.deferred_value_and_grad(
      loss.share, setup.tx, has_aux=True
    )

    def differentiate(params: Any, opt_state: Any, rows: jax.Array) -> Any:
      return run(params, opt_state, False, *loss.of(rows, 1))[:2]
  else:

    def differentiate(params: Any, opt_state: Any, rows: jax.Array) -> Any:
      del opt_state
      return jax.value_and_grad(loss.share, has_aux=True)(
        params, *loss.of(rows, 1)
      )

  args = (state.params, state.opt_state, rows)
  compiled = jax.jit(differentiate).lower(*args).compile()
  return functools.partial(compiled, *args)


def _flops(size: str) -> dict[str, float]:
  """FLOPs of a step without a refresh, over those of AdamW's, at rank d/4."""
  found = {}
  for name, (method, lean) in WAYS.items():
    config = presets.make(size, method)
    config = presets.lean(config) if lean else config
    rank = config.model.d_model // 4
    fields = [f"optimizer.rank={rank}", f"data.batch={ROWS}"]
    config = schema.override(config, [*fields, "model.remat=none"])
    mesh: Any = mesh_lib.make_mesh(config.mesh, ROWS)
    with jax.set_mesh(mesh):
      setup = setup_lib.make(config, mesh)
      step = train_step.whole_step(setup.tx, setup.abstract, config.train)
      shape = (ROWS, config.data.length + 1)
      rows = jax.ShapeDtypeStruct(shape, jnp.int32)
      program = jax.make_jaxpr(step)(setup.abstract.state, rows)
    # The cheaper branch is a step without a refresh.
    found[name] = jaxpr_cost.count_flops(program.jaxpr, min)
  return {name: flops / found["AdamW"] for name, flops in found.items()}


HEAD = ["", "gradient pass / AdamW's", "s", "training step / AdamW's", "s"]


def _rows(results: dict[str, Any]) -> list[list[str]]:
  return [
    [
      name,
      short(results["passes"][name]["ratio"]),
      short(results["passes"][name]["seconds"]),
      short(results["steps"][name]["ratio"]),
      short(results["steps"][name]["seconds"]),
    ]
    for name in WAYS
  ]


FLOPS_HEAD = ["FLOPs of a step / AdamW's, rank d/4, 256 x 256 tokens", *WAYS]


def _flops_rows(results: dict[str, Any]) -> list[list[str]]:
  return [
    [size, *(f"{found[name]:.3f}" for name in WAYS)]
    for size, found in results["flops"].items()
  ]


def text(results: dict[str, Any]) -> str:
  """The tables for the terminal."""
  parts = [tables_lib.text_table(HEAD, _rows(results))]
  if results["flops"]:
    parts.append(tables_lib.text_table(FLOPS_HEAD, _flops_rows(results)))
  return "\n\n".join(parts)


def tables(results: dict[str, Any]) -> str:
  """The tables for the page."""
  parts = [tables_lib.markdown_table(HEAD, _rows(results))]
  if results["flops"]:
    parts.append(tables_lib.markdown_table(FLOPS_HEAD, _flops_rows(results)))
  return "\n\n".join(parts)
