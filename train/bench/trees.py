"""LLaMA-shaped parameters without a model, and the optimizers to compare."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from galore_optax import galore_adamw

BLOCKS = ("attn", "mlp")  # the matrices that are projected


@dataclasses.dataclass(frozen=True)
class Size:
  """Sizes of a LLaMA, and the rank at which the GaLore paper trains it."""

  dim: int
  hidden: int
  layers: int
  vocab: int
  rank: int


SIZES = {
  "tiny": Size(32, 48, 1, 64, 8),
  "60m": Size(512, 1376, 8, 32000, 128),
  "130m": Size(768, 2048, 12, 32000, 256),
  "350m": Size(1024, 2736, 24, 32000, 256),
  "1b": Size(2048, 5461, 24, 32000, 512),
  "7b": Size(4096, 11008, 32, 32000, 1024),
}


def shapes(size: Size, stacked: bool) -> dict:
  """Shapes of the parameters of a LLaMA of this size."""
  return llama_tree(size.dim, size.hidden, size.layers, size.vocab, stacked)


def llama_tree(
  dim: int, hidden: int, layers: int, vocab: int, stacked: bool
) -> dict:
  """Shapes of a LLaMA's parameters: a leaf per matrix, or stacked by layer."""

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
  ends = {"embed": (vocab, dim), "lm_head": (dim, vocab), "norm": (dim,)}
  return ends | body


def is_shape(x: Any) -> bool:
  """Whether a node of a tree of shapes is a shape."""
  return isinstance(x, tuple)


def abstract(tree: dict) -> dict:
  """Abstract float32 arrays (`ShapeDtypeStruct`) of a tree of shapes."""
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, "float32"), tree, is_leaf=is_shape
  )


def random_like(tree: dict, seed: int, scale: float) -> dict:
  """Normally distributed arrays of a tree of shapes."""
  leaves, treedef = jax.tree.flatten(tree, is_leaf=is_shape)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  draw = jax.jit(
    lambda keys: [
      scale * jax.random.normal(keys[i], shape)
      for i, shape in enumerate(leaves)
    ]
  )
  return treedef.unflatten(draw(keys))


def in_blocks(keys: tuple, x: Any) -> bool:
  """Whether a leaf is one of the matrices that are projected."""
  return x.ndim > 1 and bool(set(BLOCKS) & {str(key.key) for key in keys})


def contrib_galore(
  rank: int, gap: int
) -> optax.GradientTransformationExtraArgs:
  """`optax.contrib.galore` on the matrices that ours projects.

  It cannot project stacked matrices: these keep full-size moments.
  """

  def dimensions(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda keys, x: (
        optax.contrib.GaLoreDimensionNumbers()
        if x.ndim == 2 and in_blocks(keys, x)
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


def contrib_muon() -> optax.GradientTransformationExtraArgs:
  """`optax.contrib.muon` on the same matrices, including stacks."""

  def dimensions(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda keys, x: (
        optax.contrib.MuonDimensionNumbers((x.ndim - 2,), (x.ndim - 1,))
        if in_blocks(keys, x)
        else None
      ),
      params,
    )

  tx = optax.contrib.muon(
    1e-3, weight_decay=0.1, muon_weight_dimension_numbers=dimensions
  )
  return optax.with_extra_args_support(tx)


OURS = "galore_adamw"
OURS_AUTO = "galore_adamw, auto"
# The same with `param_shardings`.
OURS_SHARDED = "galore_adamw, shardings"
OURS_AUTO_SHARDED = "galore_adamw, auto, shardings"
NEED_SHARDINGS = (OURS_SHARDED, OURS_AUTO_SHARDED)


def optimizers(
  rank: int, gap: int, shardings: Any = None
) -> dict[str, Callable[[], Any]]:
  """Functions that make the optimizers, ours and its peers, by name.

  Args:
    rank: Rank of the projections.
    gap: Steps between refreshes.
    shardings: The parameters' shardings; those in `NEED_SHARDINGS` use them.
  """

  def ours(**options: Any) -> Any:
    return galore_adamw(
      1e-3, rank=rank, update_proj_gap=gap, weight_decay=0.1, **options
    )

  return {
    "optax.adamw": lambda: optax.adamw(1e-3, weight_decay=0.1),
    "optax.adafactor": lambda: optax.adafactor(1e-3),
    "contrib.galore": lambda: contrib_galore(rank, gap),
    "contrib.muon": contrib_muon,
    OURS: ours,
    OURS_AUTO: lambda: ours(proj_type="auto"),
    OURS_SHARDED: lambda: ours(param_shardings=shardings),
    OURS_AUTO_SHARDED: lambda: ours(
      proj_type="auto", param_shardings=shardings
    ),
  }
