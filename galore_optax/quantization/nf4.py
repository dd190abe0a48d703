"""The 4-bit NormalFloat code of QLoRA, by arithmetic instead of a table.

It has sixteen values in [-1, 1], which divide a standard normal distribution
evenly: seven quantiles below 0, then 0, then eight above. As in all formats
here, the code of 0 is 0. Codes fall as the values rise: 7 stands for -1, and -8
for 1. bitsandbytes numbers the values from 0 upwards, which is 7 - code.

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
  index = _ZERO - code.astype(jnp.int32)
  result = jnp.full(index.shape, VALUES[0], jnp.float32)
  for i, x in enumerate(VALUES[1:], 1):
    # A chain of selections: table look-ups are slow on TPUs.
    result = jnp.where(index >= i, jnp.float32(x), result)
  return result


def code(x: jax.Array) -> jax.Array:
  """The nearest codes of x in [-1, 1], int32."""
  index = jnp.zeros(x.shape, jnp.int32)
  for low, high in itertools.pairwise(VALUES):
    index += x > jnp.float32((low + high) / 2)
  return _ZERO - index
