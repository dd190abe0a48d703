"""The optimizer step on a LLaMA-shaped tree, next to its peers.

    python -m train.bench.step

prints, for the LLaMA-60M tree with random gradients, the trace and compile
time, the state's size, the first step, the steady step, and the worst step over
a whole gap. Steps of the peers are interleaved; every figure is a time of this
one run, and the ratios are what to read. Times are processor seconds, which a
busy machine disturbs less than the clock.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import optax

from galore_optax import galore_adamw, state_bytes


@dataclasses.dataclass
class Runner:
  """One optimizer with its compiled step and live state."""

  name: str
  step: Callable
  params: dict
  state: optax.OptState
  trace_s: float
  compile_s: float
  bytes: int

  def run(self, grads: dict) -> float:
    """Runs one step.

    Args:
      grads: Gradients, one array a parameter.

    Returns:
      Processor seconds.
    """
    start = time.process_time()
    self.params, self.state = self.step(grads, self.state, self.params)
    jax.block_until_ready((self.params, self.state))
    return time.process_time() - start


def llama_tree(
  dim: int, hidden: int, layers: int, vocab: int, stacked: bool
) -> dict:
  """Shapes of a LLaMA's parameters, one leaf a matrix or stacked by layers."""

  def block(stack: tuple[int, ...]) -> dict:
    return {
      "attn": {name: (*stack, dim, dim) for name in "qkvo"},
      "mlp": {
        "gate": (*stack, dim, hidden),
        "up": (*stack, dim, hidden),
        "down": (*stack, hidden, dim),
      },
      "norm_1": (*stack, dim),
      "norm_2": (*stack, dim),
    }

  if stacked:
    body = {"layers": block((layers,))}
  else:
    body = {f"layer_{i}": block(()) for i in range(layers)}
  shapes = {"embed": (vocab, dim), "lm_head": (dim, vocab), "norm": (dim,)}
  return shapes | body


def random_like(shapes: dict, seed: int, scale: float) -> dict:
  """Normal arrays of these shapes."""
  leaves, treedef = jax.tree.flatten(
    shapes, is_leaf=lambda x: isinstance(x, tuple)
  )
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  draw = jax.jit(
    lambda keys: [
      scale * jax.random.normal(keys[i], shape)
      for i, shape in enumerate(leaves)
    ]
  )
  return treedef.unflatten(draw(keys))


def contrib_galore(
  rank: int, gap: int
) -> optax.GradientTransformationExtraArgs:
  """`optax.contrib.galore` on the matrices that ours projects."""

  def dimensions(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda keys, x: (
        optax.contrib.GaLoreDimensionNumbers()
        if x.ndim == 2 and {"attn", "mlp"} & {str(k.key) for k in keys}
        else None
      ),
      params,
    )

  tx = optax.contrib.galore(
    1e-3,
    rank=rank,
    update_proj_gap=gap,
    weight_decay=0.1,
    weight_dimension_numbers=dimensions,
  )
  return optax.with_extra_args_support(tx)


def start(name: str, tx: optax.GradientTransformation, shapes: dict) -> Runner:
  """Compiles an optimizer's step and makes its parameters and state."""
  params = random_like(shapes, 0, 0.02)
  state = jax.jit(tx.init)(params)

  def step(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  clock = time.process_time()
  traced = jax.jit(step, donate_argnums=(1, 2)).trace(params, state, params)
  trace_s = time.process_time() - clock
  lowered = traced.lower()
  clock = time.process_time()
  compiled = lowered.compile()
  compile_s = time.process_time() - clock
  size = state_bytes(state)
  return Runner(name, compiled, params, state, trace_s, compile_s, size)


def measure(args: argparse.Namespace) -> None:
  """Runs the benchmark and prints its table."""
  shapes = llama_tree(512, 1376, 8, 32000, args.stacked)
  grads = random_like(shapes, 1, 1e-3)
  optimizers = {
    "optax.adamw": optax.adamw(1e-3, weight_decay=0.1),
    "galore_adamw": galore_adamw(
      1e-3, rank=args.rank, update_proj_gap=args.gap, weight_decay=0.1
    ),
  }
  if not args.stacked and not args.no_contrib:
    optimizers["contrib.galore"] = contrib_galore(args.rank, args.gap)
  runners = [start(name, tx, shapes) for name, tx in optimizers.items()]
  first = {runner.name: runner.run(grads) for runner in runners}
  times: dict[str, list[float]] = {runner.name: [] for runner in runners}
  for step in range(1, args.gap + 1):
    for runner in runners:
      # The peers' steps are needed for the median only.
      if runner.name == "galore_adamw" or step <= args.peer_steps:
        times[runner.name].append(runner.run(grads))
  reference = statistics.median(times["optax.adamw"])
  row = "{:16} {:>9} {:>9} {:>9} {:>9} {:>9} {:>11} {:>9} {:>9}"
  head = "trace s|compile s|state MiB|first s|median s|median/adamw|worst s"
  print(row.format("", *head.split("|"), "worst/med"))
  for runner in runners:
    median = statistics.median(times[runner.name])
    worst = max(times[runner.name])
    if runner.name == "contrib.galore":
      worst = first[runner.name]  # it refreshes every matrix at step 0
    print(
      row.format(
        runner.name,
        f"{runner.trace_s:.2f}",
        f"{runner.compile_s:.2f}",
        f"{runner.bytes / 2**20:.1f}",
        f"{first[runner.name]:.3f}",
        f"{median:.3f}",
        f"{median / reference:.3f}",
        f"{worst:.3f}",
        f"{worst / median:.2f}",
      )
    )
  print(
    f"\nworst: over the steps 1 to {args.gap}; of contrib.galore its step 0, "
    "which refreshes every matrix like its every gap-th step"
  )


def main() -> None:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rank", type=int, default=128)
  parser.add_argument("--gap", type=int, default=200, help="update_proj_gap")
  parser.add_argument(
    "--peer-steps", type=int, default=20, help="steady steps of each peer"
  )
  parser.add_argument(
    "--no-contrib",
    action="store_true",
    help="without optax.contrib.galore, whose refresh takes minutes on a busy"
    " machine",
  )
  parser.add_argument(
    "--stacked", action="store_true", help="layers stacked, as under a scan"
  )
  measure(parser.parse_args())


if __name__ == "__main__":
  main()
