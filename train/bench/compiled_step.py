"""One optimizer with its compiled step and live state."""

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import jax
import optax

from galore_optax import state_bytes
from train.bench import trees
from train.measure import timing


@dataclasses.dataclass
class Runner:
  """What is timed step by step.

  Attributes:
    trace: seconds that tracing and lowering took.
    compile: seconds that compiling took.
    temporaries: bytes that the compiled step takes besides its arguments.
    state_bytes: bytes of the optimizer's state.
    lines: lines of the compiled program.
    call: makes a step.
    restart: makes a new state, so that the next step is a first one.
  """

  trace: float
  compile: float
  temporaries: int
  state_bytes: int
  lines: int
  call: Callable[[], Any]
  restart: Callable[[], None]

  def run(self) -> float:
    """Runs one step; seconds."""
    return timing.seconds(self.call)


def step_of(tx: optax.GradientTransformation, *, swapped: bool = False) -> Any:
  """The step that a user compiles: the update, added to the parameters.

  Args:
    tx: the optimizer.
    swapped: whether results come in another order than the arguments. Buffers
      that are donated are paired in order with results of their shape, so that
      moments are then written where the parameters were, and all is copied.

  Returns:
    From gradients, state and parameters to the new state and parameters.
  """

  def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state) if swapped else (state, params)

  return step


@dataclasses.dataclass
class Compiled:
  """A step that is compiled, and what that took."""

  trace: float
  compile: float
  program: Any

  @property
  def temporaries(self) -> int:
    """Bytes besides arguments and results."""
    return self.program.memory_analysis().temp_size_in_bytes


def compile_step(
  make: Callable[[], optax.GradientTransformation],
  tree: dict,
  *,
  swapped: bool = False,
) -> Compiled:
  """Traces and compiles an optimizer's step on a tree of shapes."""
  params = trees.abstract(tree)
  tx = make()
  state = jax.eval_shape(tx.init, params)
  gc.collect()
  begin = timing.clock()
  step = jax.jit(step_of(tx, swapped=swapped), donate_argnums=(1, 2))
  lowered = step.lower(params, state, params)
  traced = timing.clock()
  program = lowered.compile()
  return Compiled(traced - begin, timing.clock() - traced, program)


def start(
  make: Callable[[], Any], tree: dict, grads: dict, *, swapped: bool = False
) -> Runner:
  """Compiles an optimizer's step and makes its parameters and state."""
  compiled = compile_step(make, tree, swapped=swapped)
  params = trees.random_like(tree, 0, 0.02)
  init = jax.jit(make().init)
  live: list[Any] = [params, init(params)]
  size = state_bytes(live[1])

  def call() -> list[Any]:
    found = compiled.program(grads, live[1], live[0])
    live[:] = found if swapped else reversed(found)
    return live

  def restart() -> None:
    live[1] = None
    live[1] = jax.block_until_ready(init(live[0]))

  return Runner(
    compiled.trace,
    compiled.compile,
    compiled.temporaries,
    size,
    len(compiled.program.as_text().splitlines()),
    call,
    restart,
  )
