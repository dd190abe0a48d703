"""Training steps at LLaMA shapes: time beside AdamW's, memory as forecast.

The forecast is the compiler's: arguments, new results, temporaries and code.
The peak is what the device reports. It is that of one method alone: they run
one by one, the one with the smallest forecast first, because a device only
reports the most that was ever in use. Times are then measured in alternation.
"""

import dataclasses
import gc
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.bench.device.rows import LeftOut, Part, Settings
from train.common import units
from train.config import presets, schema
from train.measure import timing
from train.parallel import mesh as mesh_lib
from train.step import setup as setup_lib
from train.step import state as state_lib
from train.step import train_step

RESIDUAL = ("optimizer.residual=normalized", "optimizer.scale=1.0")
# Name to method, whether gradients are at rank r, and settings.
WAYS: dict[str, tuple[str, bool, tuple[str, ...]]] = {
  "AdamW": ("adamw", False, ()),
  "GaLore, residual": ("galore", False, RESIDUAL),
  "8-bit GaLore": ("galore_8bit", False, ()),
  "GaLore, lean": ("galore", True, ()),
}
SIZES = ("llama_350m", "llama_1b")
QUICK_WAYS = ("AdamW", "GaLore, lean")
# What a slow device takes instead, the first that fits the time.
SMALLER = ("llama_130m", "llama_60m", "llama_9m")
TINY = (
  "model.vocab_size=64",
  "model.d_model=32",
  "model.d_ff=48",
  "model.n_layers=2",
  "model.n_heads=2",
  "optimizer.rank=8",
)
ROUNDS = timing.Budget(most=9, least=3, limit=15.0)
# Guesses, to leave out what would take too long: seconds of compiling a step,
# and how much of the rate of products a step reaches.
COMPILING, REACHED = 15.0, 0.3


@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows and tokens a row."""

  rows: int
  length: int

  @property
  def tokens(self) -> int:
    """Tokens of a batch."""
    return self.rows * self.length


def run(part: Part, settings: Settings) -> None:
  """Measures the sizes that fit the device and the time."""
  if settings.quick:
    with part.guarded("tiny"):
      measure(part, settings, "tiny", Batch(2, 16))
    return
  slow = settings.device["platform"] == "cpu"
  batch = Batch(2, 256) if slow else Batch(16, 256)
  done = False
  for size in settings.sizes:
    with part.guarded(size):
      check_time(settings, size, batch)
      measure(part, settings, size, batch)
      done = True
  for size in () if done else SMALLER:
    with part.guarded(size):
      check_time(settings, size, batch)
      measure(part, settings, size, batch)
      break


def check_time(settings: Settings, size: str, batch: Batch) -> None:
  """Raises `LeftOut` if a size would not fit the time that is left."""
  model = presets.make(size, "adamw").model
  body = model.n_layers * (4 * model.d_model + 3 * model.d_ff) * model.d_model
  flops = 6 * (body + model.vocab_size * model.d_model) * batch.tokens
  step = flops / (REACHED * settings.device["flops"])
  # Two steps for the peak, one untimed, and the timed ones.
  seconds = len(WAYS) * (COMPILING + (3 + ROUNDS.least) * step)
  if seconds > settings.left():
    raise LeftOut(
      f"a step takes some {step:.3g} s here; all would take {seconds:,.0f} s,"
      f" and {max(settings.left(), 0):,.0f} s are left"
    )


def config_of(
  size: str,
  method: str,
  batch: Batch,
  dtype: str,
  settings: Sequence[str] = (),
  *,
  lean: bool = False,
) -> schema.Config:
  """The run of a method at a size."""
  config = presets.make("llama_60m" if size == "tiny" else size, method)
  config = presets.lean(config) if lean else config
  fields = [
    f"data.batch={batch.rows}",
    f"data.length={batch.length}",
    f"model.dtype={dtype}",
    f"model.param_dtype={dtype}",
    "optimizer.clip=1.0",
  ]
  fields += TINY if size == "tiny" else ()
  return schema.override(config, [*fields, *settings])


class Trainer:
  """A compiled training step on the first device, and its state.

  Attributes:
    forecast: Bytes at the peak, by the compiler.
    arguments: Bytes of them that are state and batch.
    tokens: Tokens of a batch.
  """

  def __init__(self, config: schema.Config):
    """Compiles the step; nothing is allocated."""
    self._config = config
    self.tokens = config.data.batch * config.data.length
    devices = jax.devices()[:1]
    self._mesh = mesh_lib.make_mesh(
      config.mesh, config.data.batch, devices=devices
    )
    with jax.set_mesh(self._mesh):
      self._setup = setup_lib.make(config, self._mesh)
      step, compiled = self._compile()
    sizes = compiled.memory_analysis()
    self.arguments = sizes.argument_size_in_bytes
    self.forecast = (
      self.arguments
      + sizes.output_size_in_bytes
      - sizes.alias_size_in_bytes
      + sizes.temp_size_in_bytes
      + sizes.generated_code_size_in_bytes
    )
    state = self._setup.abstract.state
    packed = any(x.dtype == jnp.int4 for x in jax.tree.leaves(state))
    # Programs compiled ahead refuse 4-bit arguments (see train/run/loop.py).
    self._step = step if packed else compiled
    self._state: Any = None
    self._rows: Any = None

  def _compile(self) -> tuple[Any, Any]:
    """The jitted step, and the same compiled ahead."""
    abstract, config = self._setup.abstract, self._config
    rows = jax.ShapeDtypeStruct(
      (config.data.batch, config.data.length + 1),
      jnp.int32,
      sharding=mesh_lib.batch_sharding(self._mesh),
    )
    state = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      abstract.state,
      abstract.shardings,
    )
    step: Any = train_step.make_train_step(
      self._setup.updater, abstract, config.train
    )
    return step, step.lower(state, rows).compile()

  def start(self) -> None:
    """Makes weights, state and a batch."""
    config = self._config
    with jax.set_mesh(self._mesh):
      self._state = state_lib.init_state(
        self._setup.updater, self._setup.abstract, 0
      )
    ids = np.random.default_rng(0).integers(
      0, config.model.vocab_size, (config.data.batch, config.data.length + 1)
    )
    where = mesh_lib.batch_sharding(self._mesh)
    self._rows = jax.device_put(np.asarray(ids, np.int32), where)
    jax.block_until_ready(self._state)

  def step(self) -> dict[str, jax.Array]:
    """Makes a training step; returns its metrics."""
    with jax.set_mesh(self._mesh):
      self._state, metrics = self._step(self._state, self._rows)
    return metrics

  def stop(self) -> None:
    """Frees what `start` made."""
    self._state = self._rows = None
    gc.collect()


def peak() -> int | None:
  """The most bytes that were ever in use; None if the device does not say."""
  stats = jax.devices()[0].memory_stats() or {}
  return stats.get("peak_bytes_in_use")


def peak_alone(trainer: Trainer) -> tuple[int | None, float]:
  """The peak of a method by itself, and its loss after two steps.

  The peak is None if the device does not report one, or if making the weights,
  or a method before, took more.
  """
  trainer.start()
  before = peak()
  metrics = [trainer.step() for _ in range(2)]  # the first refreshes all bases
  loss = float(metrics[-1]["loss"])
  after = peak()
  trainer.stop()
  risen = before is not None and after is not None and after > before
  return (after if risen else None), loss


def measure(part: Part, settings: Settings, size: str, batch: Batch) -> None:
  """Measures all methods at one size."""
  dtype = settings.device["dtype"]
  room = settings.device["memory"]
  trainers: dict[str, Trainer] = {}
  for way in QUICK_WAYS if settings.quick else WAYS:
    name = f"{size}, {way}"
    with part.guarded(name):
      method, lean, own = WAYS[way]
      trainer = Trainer(config_of(size, method, batch, dtype, own, lean=lean))
      part.add(name=name, forecast=trainer.forecast, dtype=dtype)
      check_room(trainer.forecast, room)
      trainers[way] = trainer
  for way in sorted(trainers, key=lambda x: trainers[x].forecast):
    name = f"{size}, {way}"
    with part.guarded(name):
      highest, loss = peak_alone(trainers[way])
      part.add(name=name, peak=highest, loss=loss, tokens=batch.tokens)
      continue
    del trainers[way]  # it failed
  for way, found in in_alternation(part, trainers, size, room).items():
    part.add(name=f"{size}, {way}", **found)


def check_room(needed: int, room: int | None) -> None:
  """Raises `LeftOut` if a program would not fit the memory."""
  if room is not None and needed > room:
    raise LeftOut(
      f"needs {needed / units.GIB:.1f} GiB by the compiler's forecast, of"
      f" {room / units.GIB:.1f} GiB"
    )


def in_alternation(
  part: Part, trainers: dict[str, Trainer], size: str, room: int | None
) -> dict[str, dict[str, float]]:
  """Median seconds of each method, and the median ratio to AdamW's.

  All states are in memory at the same time; where they do not fit together,
  AdamW's and one other are.
  """
  first = next(iter(WAYS))
  others = [way for way in trainers if way != first]
  groups = [[first, *others]]
  if room is not None and together(trainers.values()) > room:
    groups = [[first, other] for other in others]
  found: dict[str, dict[str, float]] = {}
  for group in groups:
    with part.guarded(f"{size}, times of {' and '.join(group)}"):
      members = {way: trainers[way] for way in group if way in trainers}
      check_room(together(members.values()), room)
      found = medians(members, first) | found
    for trainer in trainers.values():
      trainer.stop()
  return found


def together(trainers: Any) -> int:
  """Bytes for all states, and for the step that needs most beside them."""
  states = sum(x.arguments for x in trainers)
  return states + max((x.forecast - x.arguments for x in trainers), default=0)


def medians(
  trainers: dict[str, Trainer], first: str
) -> dict[str, dict[str, float]]:
  """Median seconds, and the median ratio to the first's within a round."""
  for trainer in trainers.values():
    trainer.start()
  runs = {way: trainer.step for way, trainer in trainers.items()}
  times = timing.interleave(runs, ROUNDS)
  found = {}
  for way, values in times.items():
    found[way] = {"seconds": statistics.median(values)}
    if first in times:
      pairs = zip(values, times[first], strict=False)
      found[way]["ratio"] = statistics.median(a / b for a, b in pairs)
  return found
