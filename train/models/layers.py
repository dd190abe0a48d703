"""What the models have in common: dense layers, stacked blocks, `nnx.scan`.

All layers of a model are one stacked module: `nnx.scan` runs it, so a block is
traced and compiled once whatever the depth, and every kernel has a leading
layer axis: (L, rows, columns).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from train.config.schema import ModelConfig
from train.models import encoder_config
from train.parallel.mesh import RULES

Config = ModelConfig | encoder_config.Config
Module = TypeVar("Module", bound=nnx.Module)

# What a layer stores for the backward pass besides its input. `full`: nothing;
# that takes a third more compute, and L times fewer activations are stored.
# `dots`: the outputs of the projections, so that only the attention and
# elementwise operations are computed twice.
REMAT = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def linear(
  config: Config,
  fan_in: int,
  fan_out: int,
  axes: tuple[str, str],
  rngs: nnx.Rngs,
  use_bias: bool,
) -> nnx.Linear:
  """A dense layer.

  Args:
    config: of the model.
    fan_in: input features.
    fan_out: output features.
    axes: logical names of the kernel's axes, for sharding.
    rngs: random streams for the initial values.
    use_bias: whether the layer has a bias.
  """
  return nnx.Linear(
    fan_in,
    fan_out,
    use_bias=use_bias,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.dtype(config.param_dtype),
    kernel_init=nnx.initializers.normal(config.init_std),
    kernel_metadata={"out_sharding": axes},
    bias_metadata={"out_sharding": ("norm",)},
    rngs=rngs,
  )


def embedding(
  config: Config, rows: int, axis: str, rngs: nnx.Rngs
) -> nnx.Embed:
  """A table of `rows` embeddings; `axis` is the logical name of its rows."""
  return nnx.Embed(
    rows,
    config.d_model,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.dtype(config.param_dtype),
    embedding_init=nnx.initializers.normal(config.init_std),
    embedding_metadata={"out_sharding": (axis, "features")},
    rngs=rngs,
  )


def stack(
  make: Callable[[nnx.Rngs], Module],
  count: int,
  rngs: nnx.Rngs,
  axis: str = "layers",
) -> Module:
  """`count` modules as one whose parameters have a leading axis.

  Args:
    make: makes one of them.
    count: their number.
    rngs: random streams for the initial values.
    axis: logical name of the leading axis, for sharding.
  """

  @nnx.split_rngs(splits=count)
  @nnx.vmap(
    in_axes=(0,),
    out_axes=0,
    transform_metadata={nnx.PARTITION_NAME: axis},
  )
  def stacked(rngs: nnx.Rngs) -> Module:
    return make(rngs)

  return stacked(rngs)


def scan(config: Config, body: Callable[..., Any], x: Any, *stacked) -> Any:
  """Applies the layers one after another.

  Args:
    config: of the model; its `remat` says what is stored for the backward pass.
    body: one layer: the activations and a slice of each of `stacked` to the
      activations.
    x: the activations before the first layer, an array or a tree.
    *stacked: the stacked layers, and other trees with a leading layer axis.

  Returns:
    The activations after the last layer.
  """
  if config.remat != "none":
    body = nnx.remat(body, policy=REMAT[config.remat])
  layers = nnx.scan(
    body,
    in_axes=(nnx.Carry, *(0 for _ in stacked)),
    out_axes=nnx.Carry,
    unroll=config.unroll,
  )
  return layers(x, *stacked)


def abstract(make: Callable[[nnx.Rngs], Module]) -> Module:
  """A model with `jax.ShapeDtypeStruct`s for its parameters: no memory."""
  # Eager sharding would need a mesh here. `mesh.param_shardings` reads the
  # logical names instead. The rules are for eval_shape, which translates the
  # names if a mesh is set.
  with nnx.use_eager_sharding(False), nnx.logical_axis_rules(RULES):
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


def init(make: Callable[[nnx.Rngs], nnx.Module], seed: int | jax.Array) -> dict:
  """Random initial parameters of a model, as nested dicts."""
  with nnx.use_eager_sharding(False):
    model = make(nnx.Rngs(jax.random.key(seed)))
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))
