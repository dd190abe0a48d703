"""The 4-bit NormalFloat code of QLoRA, by arithmetic instead of a table.

Sixteen values in [-1, 1] that share out a standard normal distribution evenly:
quantiles of it, seven below 0, then 0, then eight above. The code of 0 is 0,
as in all formats here, so codes run against the values: 7 stands for -1, and
-8 for 1. bitsandbytes numbers the values from 0 upwards, which is 7 - code.

Dettmers et al., `QLoRA: Efficient Finetuning of Quantized LLMs
<https://arxiv.org/abs/2305.14314>`_, 2023, section 3 and appendix E.
"""

import itertools

import jax
import jax.numpy as jnp

# As printed in appendix E of the paper.
VALUES = (
  -1.0,
  -0.6961928009986877,
  -0.5250730514526367,
  -0.39491748809814453,
  -0.28444138169288635,
  -0.18477343022823334,
  -0.09105003625154495,
  0.0,
  0.07958029955625534,
  0.16093020141124725,
  0.24611230194568634,
  0.33791524171829224,
  0.44070982933044434,
  0.5626170039176941,
  0.7229568362236023,
  1.0,
)
_ZERO = VALUES.index(0.0)


def value(code: jax.Array) -> jax.Array:
  """The values of codes -8 ... 7, float32."""
  place = _ZERO - code.astype(jnp.int32)
  found = jnp.full(place.shape, VALUES[0], jnp.float32)
  for i, x in enumerate(VALUES[1:], 1):
    # A chain of selections; looking values up is slow on TPUs.
    found = jnp.where(place >= i, jnp.float32(x), found)
  return found


def code(x: jax.Array) -> jax.Array:
  """The nearest codes of x in [-1, 1], int32."""
  place = jnp.zeros(x.shape, jnp.int32)
  for low, high in itertools.pairwise(VALUES):
    place += x > jnp.float32((low + high) / 2)
  return _ZERO - place
