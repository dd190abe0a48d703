"""How convolution kernels can be read: the state, and what it keeps.

For each view, the share of the gradient's energy that exact bases keep is
measured on gradients of a training run with AdamW.
"""

import dataclasses
import statistics
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax as go
from train.architectures import catalog, cnn, loop, optimizers, tables
from train.architectures.cnn import Config
from train.measure.tables import markdown_table

ONE_MATRIX = optimizers.ONE_MATRIX
VIEWS = {
  "nine matrices": go.Projection(rows=2, cols=3),
  "one matrix": ONE_MATRIX,
  "one matrix, both sides": dataclasses.replace(ONE_MATRIX, proj_type="full"),
  "tensor": optimizers.TENSOR,
}
SHARES = (0.125, 0.25, 0.375)  # rank, of the sides that are projected
TIMES = 4  # gradients, evenly spaced over the run
ADAMW = 0.032, 0.0625  # rates that the search chose


def table(config: Config) -> str:
  """A table in Markdown; trains once.

  Args:
    config: The sizes of the run.
  """
  grads = list(_gradients(config))
  rows = [
    (view, f"{share:g}", *_row(how, share, grads))
    for view, how in VIEWS.items()
    for share in SHARES
  ]
  head = ("kernel read as", "rank, share", "state, bytes", "of Adam's")
  return markdown_table((*head, "energy kept"), rows)


def _gradients(config: Config) -> Iterator[dict[str, jax.Array]]:
  """Path to gradient, for the kernels, at some steps of a run."""
  entry = catalog.get("cnn")
  trainer = loop.build(entry, config, loop.Rates(tables.ADAMW.name, *ADAMW))
  state, batches = trainer.start(0), entry.prepare(config).batches(0)

  @jax.jit
  def gradient(params: Any, batch: Any) -> Any:
    def loss(params: Any) -> jax.Array:
      logits = state.apply_fn({"params": params}, batch["image"])
      return cnn.cross_entropy(logits, batch["label"])

    return jax.grad(loss)(params)

  gap = max(1, config.steps // TIMES)
  for step in range(1, config.steps + 1):
    batch = next(batches)
    if step % gap == 0:
      grads = gradient(trainer.params(state), batch)
      names = [f"conv_{i}" for i in range(1, config.depth)]
      yield {name: grads[name] for name in names}
    state, _ = trainer.step(state, batch)


def _row(
  how: go.Projection, share: float, grads: list[dict[str, Any]]
) -> tuple[str, str, str]:
  """Bytes of the state, its share of Adam's, and the energy that is kept."""
  tx = go.galore(
    optax.adam(1.0),
    rank=share,
    rules=((cnn.KERNELS, how), ("", None)),
    refresh=go.Refresh(policy="synchronous", finder="svd"),
  )
  update = jax.jit(tx.update)
  kept = []
  for g in grads:
    _, state = update(g, tx.init(g))
    for path, bases in go.find_bases(state).items():
      kernel = g[path.split("/")[0]]["kernel"]
      if how.rows == ONE_MATRIX.rows:
        kernel = kernel.reshape(-1, kernel.shape[-1])
      kept.append(_share_kept(kernel, bases))
  rows = [x for x in go.describe(tx, grads[0]).rows if x.rank]
  size = sum(row.state_bytes for row in rows)
  of_adam = size / sum(row.adam_bytes for row in rows)
  return f"{size:,}", f"{of_adam:.0%}", f"{statistics.mean(kept):.1%}"


def _share_kept(g: jax.Array, bases: Any) -> float:
  """The share of the energy of a stack of matrices, or of a tensor."""
  shares = go.captured_energy(g, bases)
  weights = jnp.sum(g * g, range(shares.ndim, g.ndim))
  return float(jnp.sum(shares * weights) / jnp.sum(weights))
