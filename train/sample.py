"""Text from a model: the tokens are drawn one by one in one jitted loop."""

import jax
import jax.numpy as jnp
import tokenizers
from flax import nnx

from train import llama


def generate(
  graphdef: nnx.GraphDef,
  params: dict,
  prompt: jax.Array,
  count: int,
  temperature: float,
  key: jax.Array,
) -> jax.Array:
  """Continues a prompt.

  The whole row goes through the model for every token: there is no cache of
  keys and values, which a sample of some dozen tokens does not need. Places
  that are not written yet lie in the future, so they change nothing.

  Args:
    graphdef: the model's structure.
    params: its parameters.
    prompt: (n,) int32 ids, n >= 1.
    count: tokens to draw.
    temperature: divides the logits; small values are greedy.
    key: the random key.

  Returns:
    (n + count,) ids: the prompt and its continuation.
  """
  length = prompt.shape[0]
  row = jnp.zeros(length + count, jnp.int32).at[:length].set(prompt)

  def draw(i: jax.Array, row: jax.Array) -> jax.Array:
    logits = llama.apply(graphdef, params, row[None])[0, i - 1]
    drawn = jax.random.fold_in(key, i)
    token = jax.random.categorical(drawn, logits / temperature)
    return row.at[i].set(token.astype(jnp.int32))

  return jax.lax.fori_loop(length, length + count, draw, row)


def sample_text(
  graphdef: nnx.GraphDef,
  params: dict,
  tokenizer: tokenizers.Tokenizer,
  prompt: str,
  count: int,
  temperature: float,
  seed: int,
) -> str:
  """The prompt with `count` more tokens, as text."""
  ids = jnp.asarray(tokenizer.encode(prompt).ids, jnp.int32)
  run = jax.jit(generate, static_argnums=(0, 3))
  row = run(graphdef, params, ids, count, temperature, jax.random.key(seed))
  return tokenizer.decode(jax.device_get(row).tolist())
