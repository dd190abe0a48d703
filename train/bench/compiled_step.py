"""An optimizer's step: compiled, with its state, ready to be timed."""

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import jax
import optax

from galore_optax import state_bytes
from train.bench import trees
from train.measure import timing


def step_of(tx: optax.GradientTransformation, *, swapped: bool = False) -> Any:
  """The step that a user compiles: the update, added to the parameters.

  Args:
    tx: The optimizer.
    swapped: Whether the results come in another sequence than the arguments.
      XLA pairs donated buffers with results of the same shape in sequence, so
      it then writes moments where parameters were, and copies everything.

  Returns:
    A function from gradients, state and parameters to new state and parameters.
  """

  def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state) if swapped else (state, params)

  return step


@dataclasses.dataclass
class Compiled:
  """A compiled step.

  Attributes:
    trace: Seconds of tracing and lowering.
    compile: Seconds of compiling.
    program: The compiled step, from gradients, state and parameters.
  """

  trace: float
  compile: float
  program: Any

  @property
  def temporaries(self) -> int:
    """Bytes that the program takes besides arguments and results."""
    return self.program.memory_analysis().temp_size_in_bytes

  @property
  def lines(self) -> int:
    """Lines of the compiled program's HLO."""
    return len(self.program.as_text().splitlines())


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


class LiveStep:
  """A compiled step with the parameters and the state that it updates.

  Attributes:
    compiled: The compiled step.
    state_bytes: Bytes of the optimizer's state.
  """

  def __init__(
    self,
    make: Callable[[], Any],
    tree: dict,
    grads: dict,
    *,
    swapped: bool = False,
  ):
    """Compiles an optimizer's step, and makes its parameters and state."""
    self.compiled = compile_step(make, tree, swapped=swapped)
    self._grads, self._swapped = grads, swapped
    self._init = jax.jit(make().init)
    self._params = trees.random_like(tree, 0, 0.02)
    self._state: Any = self._init(self._params)
    self.state_bytes = state_bytes(self._state)

  def call(self) -> Any:
    """Makes one step; returns the new state and parameters."""
    results = self.compiled.program(self._grads, self._state, self._params)
    self._state, self._params = reversed(results) if self._swapped else results
    return self._state, self._params

  def restart(self) -> None:
    """Makes a new state, so that the next step is a first step."""
    self._state = None  # frees its memory before the new one is made
    self._state = jax.block_until_ready(self._init(self._params))
