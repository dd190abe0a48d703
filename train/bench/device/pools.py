"""LLaMA-7B layer by layer inside a memory pool of the size of a smaller card.

The process is started with a pool of that size, so that a step which runs does
so on such a card, apart from what the driver takes there.
"""

import statistics
import time
from typing import Any

import jax

from train.bench.device import steps
from train.bench.device.rows import LeftOut, Part, Settings
from train.common import units
from train.common.errors import first_line
from train.config import schema

POOLS = (24.0, 16.0)  # GB
BATCH, TINY = steps.Batch(1, 256), steps.Batch(1, 16)
# Name to method and settings.
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
  "8-bit GaLore": ("galore_8bit", ("optimizer.basis_dtype=int8",)),
  "Q-GaLore": ("q_galore", ()),
}
STEPS = 5
MOST = 0.97  # of a device's memory, for a pool


def cases(device: dict[str, Any], quick: bool) -> list[tuple[str, float]]:
  """Method and pool, in GB, of each process to start; 0 GB is all memory.

  The most telling cases come first, in case that time runs out.

  Raises:
    LeftOut: The device can show nothing here.
  """
  if quick:
    raise LeftOut("--quick trains no large model")
  if device["platform"] == "cpu":
    raise LeftOut("a CPU has no memory pool of a fixed size")
  if device["platform"] != "gpu":
    return [(way, 0.0) for way in WAYS]  # JAX bounds the pools of GPUs only
  memory = device["memory"] or 0
  found = [
    (way, pool)
    for way, pool in (
      ("8-bit GaLore", POOLS[0]),
      ("Q-GaLore", POOLS[1]),
      ("Q-GaLore", POOLS[0]),
      ("8-bit GaLore", POOLS[1]),
    )
    if pool * units.GB < MOST * memory
  ]
  if not found:
    raise LeftOut(
      f"the device has {memory / units.GB:.1f} GB, and the smallest pool is of"
      f" {min(POOLS):g} GB"
    )
  return found


def name_of(way: str, pool_gb: float, quick: bool) -> str:
  """The name of a case."""
  pool = f"a pool of {pool_gb:g} GB" if pool_gb else "all memory"
  return f"{'tiny' if quick else 'llama_7b'}, {way}, {pool}"


def run(part: Part, settings: Settings) -> None:
  """Runs one method in the pool of this process."""
  quick = settings.quick
  name = name_of(settings.case, settings.pool_gb, quick)
  found: dict[str, Any] = {"way": settings.case}
  with part.guarded(name, found):
    trainer = steps.Trainer(config_of(settings))
    found["forecast"] = trainer.forecast
    pool = int(settings.pool_gb * units.GB)
    steps.check_room(trainer.forecast, pool or settings.device["memory"])
    doing = "making the weights"
    try:
      trainer.start()
      found["peak_of_weights"] = steps.peak()
      doing = "a step"
      found |= _steps(trainer)
    except jax.errors.JaxRuntimeError as error:
      raise RuntimeError(f"in {doing}: {first_line(error)}") from error
    part.add(name=name, peak=steps.peak(), **found)


def config_of(settings: Settings) -> schema.Config:
  """The run of a case."""
  method, own = WAYS[settings.case]
  size, batch = ("tiny", TINY) if settings.quick else ("llama_7b", BATCH)
  fields = ("train.layerwise=true", "optimizer.proj_type=auto", *own)
  dtype = settings.device["dtype"]
  return steps.config_of(size, method, batch, dtype, fields)


def _steps(trainer: steps.Trainer) -> dict[str, float | int]:
  """Makes some steps; the first refreshes all bases and is not timed."""
  seconds, loss = [], 0.0
  for _ in range(STEPS):
    begin = time.perf_counter()
    loss = float(trainer.step()["loss"])
    seconds.append(time.perf_counter() - begin)
  return {
    "seconds": statistics.median(seconds[1:]),
    "loss": loss,
    "tokens": trainer.tokens,
  }
