"""Samples text from a model: `python -m train.sample MODEL --prompt ...`.

The prompts pass through the model once, which fills a cache of keys and values.
After that, each new token takes the model one position. Both steps are compiled
once, because their shapes do not depend on the length of the text so far.
"""

import argparse
import dataclasses
import functools
import itertools
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from train.common import commands, inputs
from train.common.errors import UserError
from train.config.schema import ModelConfig
from train.data import tokenizer as tokenizer_lib
from train.models import llama
from train.pretrained import llama_checkpoint, llama_names

CHUNK = 16  # tokens drawn between two fetches from the device


class Sampling(NamedTuple):
  """How a token is drawn from the logits. Each field may be a traced number.

  Attributes:
    temperature: Divides the logits; 0 always takes the most likely token.
    top_k: Number of most likely tokens to draw from; 0 draws from all.
    top_p: Draws from the fewest most likely tokens whose probabilities add up
      to at least this.
  """

  temperature: Any = 1.0
  top_k: Any = 0
  top_p: Any = 1.0

  def check(self) -> "Sampling":
    """Returns itself if all values are valid; raises UserError otherwise."""
    if not 0 <= self.temperature < float("inf"):
      raise UserError(f"--temperature is {self.temperature}; use 0 or above")
    if self.top_k < 0:
      raise UserError(f"--top-k is {self.top_k}; use 0 (all) or above")
    if not 0 < self.top_p <= 1:
      raise UserError(f"--top-p is {self.top_p}; it must lie in (0, 1]")
    return self


class Text(NamedTuple):
  """A batch of texts during generation.

  Attributes:
    cache: Keys and values of the positions so far.
    length: Positions in the cache (B,).
    token: Newest token of each text (B,), not in the cache yet.
    key: Random key of the next draw.
  """

  cache: llama.Cache
  length: jax.Array
  token: jax.Array
  key: jax.Array


def draw(logits: jax.Array, how: Sampling, key: jax.Array) -> jax.Array:
  """Draws one token for each row.

  Args:
    logits: Logits (B, V).
    how: Temperature, top-k and top-p, applied in this sequence.
    key: Random key, from which each row gets its own.

  Returns:
    Tokens (B,), int32.
  """
  # The tokens are sorted by likelihood, so that top-k keeps exactly k of them
  # even if some are equally likely.
  by_likelihood = jnp.argsort(logits, descending=True)
  scaled = jnp.take_along_axis(logits, by_likelihood, 1)
  scaled = scaled / jnp.maximum(how.temperature, 1e-6)
  rank = jnp.arange(logits.shape[1])
  scaled = jnp.where((how.top_k == 0) | (rank < how.top_k), scaled, -jnp.inf)
  shares = jax.nn.softmax(scaled)
  before = jnp.cumsum(shares, axis=1) - shares
  # The most likely token stays in, however the sums are rounded.
  allowed = (before < how.top_p) | (rank == 0)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(logits)))
  drawn = jax.vmap(jax.random.categorical)(
    keys, jnp.where(allowed, scaled, -jnp.inf)
  )
  drawn = jnp.where(how.temperature == 0, 0, drawn)
  tokens = jnp.take_along_axis(by_likelihood, drawn[:, None], 1)
  return tokens[:, 0].astype(jnp.int32)


def _next(
  config: ModelConfig, params: dict, x: jax.Array, text: Text, how: Sampling
) -> Text:
  """Draws the next token from the last position's features x (B, D)."""
  key, drawn = jax.random.split(text.key)
  logits = llama.head(config, params, x, len(x))[:, 0]
  return text._replace(token=draw(logits, how, drawn), key=key)


@functools.partial(jax.jit, static_argnums=(0, 4))
def prefill(
  config: ModelConfig,
  params: dict,
  prompts: jax.Array,
  lengths: jax.Array,
  room: int,
  how: Sampling,
  key: jax.Array,
) -> Text:
  """Runs the model on the prompts and draws the first token after each.

  Args:
    config: Config of the model.
    params: Parameters of the model.
    prompts: Token ids (B, P), padded at the end with any token: generation
      overwrites a padded position of the cache before any token attends to it.
    lengths: Number of tokens of each prompt (B,), at least 1.
    room: Number of positions of the cache.
    how: How tokens are drawn.
    key: Random key.
  """
  rows, width = prompts.shape
  cache = llama.empty_cache(config, rows, room)
  positions = jnp.broadcast_to(jnp.arange(width), prompts.shape)
  x, cache = llama.extend(config, params, prompts, positions, cache)
  last = x.reshape(rows, width, -1)[jnp.arange(rows), lengths - 1]
  text = Text(cache, lengths, jnp.zeros(rows, jnp.int32), key)
  return _next(config, params, last, text, how)


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def decode(
  config: ModelConfig, params: dict, text: Text, how: Sampling, count: int
) -> tuple[Text, jax.Array]:
  """Draws `count` more tokens for each text.

  Returns:
    The text, and tokens (B, count). These begin with the newest token of the
    given text, and do not yet contain the newest of the returned one.
  """

  def step(text: Text, _: None) -> tuple[Text, jax.Array]:
    x, cache = llama.extend(
      config, params, text.token[:, None], text.length[:, None], text.cache
    )
    longer = text._replace(cache=cache, length=text.length + 1)
    return _next(config, params, x, longer, how), text.token

  text, tokens = jax.lax.scan(step, text, length=count)
  if not jax.sharding.get_abstract_mesh().empty:
    # Replicated, so that each of several processes can read them.
    replicated = jax.sharding.PartitionSpec()
    tokens = jax.lax.with_sharding_constraint(tokens, replicated)
  return text, tokens.T


def stream(
  config: ModelConfig,
  params: dict,
  prompts: Sequence[Sequence[int]],
  count: int,
  how: Sampling,
  seed: int,
) -> Iterator[np.ndarray]:
  """Continues each prompt by `count` tokens, a few at a time.

  Args:
    config: Config of the model.
    params: Parameters of the model.
    prompts: Token ids of each prompt, at least one.
    count: Number of tokens to draw for each.
    how: How tokens are drawn.
    seed: Random seed.

  Yields:
    The next token ids (B, n), int32.
  """
  lengths = np.array([len(ids) for ids in prompts], np.int32)
  rows = np.zeros((len(prompts), lengths.max()), np.int32)
  for row, ids in zip(rows, prompts, strict=True):
    row[: len(ids)] = ids
  chunk = min(CHUNK, count)
  room = rows.shape[1] + -(-count // chunk) * chunk
  key = jax.random.key(seed)
  text = prefill(config, params, rows, lengths, room, how, key)
  for start in range(0, count, chunk):
    text, tokens = decode(config, params, text, how, chunk)
    yield jax.device_get(tokens)[:, : count - start]


def generate(
  config: ModelConfig,
  params: dict,
  prompts: Sequence[Sequence[int]],
  count: int,
  how: Sampling,
  seed: int = 0,
) -> np.ndarray:
  """The `count` tokens that follow each prompt: (B, count), int32."""
  if not count:
    return np.zeros((len(prompts), 0), np.int32)
  chunks = stream(config, params, prompts, count, how, seed)
  return np.concatenate(list(chunks), axis=1)


def sample_text(
  config: ModelConfig,
  params: dict,
  tokenizer: tokenizers.Tokenizer,
  prompt: str,
  count: int,
  how: Sampling,
  seed: int,
) -> str:
  """The prompt, continued by `count` tokens, as text."""
  ids = encode(tokenizer, prompt)
  drawn = generate(config, params, [ids], count, how, seed)[0]
  return tokenizer.decode(ids + drawn.tolist())


def encode(tokenizer: tokenizers.Tokenizer, prompt: str) -> list[int]:
  """Encodes a prompt.

  Raises:
    UserError: The prompt has no tokens.
  """
  # Like the training text, without special tokens before or after it.
  with inputs.refusing(f"the tokenizer cannot encode {prompt!r}"):
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
  if not ids:
    raise UserError(f"the prompt {prompt!r} has no tokens; give it a few words")
  return ids


def beginning(
  tokenizer: tokenizers.Tokenizer, weights: llama_names.Weights
) -> list[int]:
  """The token that begins every text, if config and tokenizer agree on one."""
  token = weights.extra.get("config.json", {}).get("bos_token_id")
  with inputs.refusing(f"{weights.source}: its tokenizer cannot be used"):
    first = tokenizer.encode("a").ids[:1]
  return first if first == [token] else []


def say(
  chunks: Iterator[np.ndarray],
  tokenizer: tokenizers.Tokenizer,
  ids: list[int],
  ends: Sequence[int],
) -> None:
  """Prints a text while it is generated, up to its end token.

  Args:
    chunks: Token ids (1, n) that continue the text.
    tokenizer: The model's tokenizer.
    ids: Tokens of the prompt, which are not printed.
    ends: Tokens that end a text.
  """
  shown = ""
  for chunk in chunks:
    new = chunk[0].tolist()
    end = next((i for i, token in enumerate(new) if token in ends), None)
    ids = ids + new[:end]
    text = tokenizer.decode(ids)
    # The last character may lack some of its tokens; it is printed later.
    complete = text.rstrip("\N{REPLACEMENT CHARACTER}")
    print(complete[len(shown) :], end="", flush=True)
    shown = complete
    if end is not None:
      break
  print()


def until(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
  """The tokens before the first end token."""
  return list(itertools.takewhile(lambda token: token not in ends, ids))


def parse(argv: list[str] | None) -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m train.sample",
    description="Continues prompts with a trained model, and prints the texts.",
  )
  parser.add_argument(
    "source",
    type=pathlib.Path,
    metavar="MODEL",
    help="folder of a run, folder of LLaMA safetensors, or .gguf file",
  )
  parser.add_argument(
    "--prompt",
    action="append",
    required=True,
    metavar="TEXT",
    help="text to continue; repeat the option for several texts",
  )
  add = parser.add_argument
  add(
    "--tokens",
    type=int,
    default=100,
    help="most tokens to draw for a prompt (default: %(default)s)",
  )
  add(
    "--temperature",
    type=float,
    default=0.8,
    help="divides the logits; 0 always takes the most likely token"
    " (default: %(default)s)",
  )
  add(
    "--top-k",
    type=int,
    default=0,
    help="draw only from this many most likely tokens; 0: from all (default)",
  )
  add(
    "--top-p",
    type=float,
    default=1.0,
    help="draw only from the fewest most likely tokens whose probabilities"
    " reach this sum; 1: from all (default)",
  )
  add("--seed", type=int, default=0, help="random seed (default: 0)")
  parser.add_argument(
    "--step",
    type=int,
    default=0,
    help="step of the run's checkpoint to use; 0: the newest (default)",
  )
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    default="",
    help="dtype of weights and computation (default: the run's, else float32)",
  )
  return parser.parse_args(argv)


def run(flags: argparse.Namespace) -> None:
  """Loads the model and prints the continued texts."""
  how = Sampling(flags.temperature, flags.top_k, flags.top_p).check()
  if flags.tokens < 1:
    raise UserError(f"--tokens is {flags.tokens}; use 1 or more")
  weights = llama_checkpoint.load(flags.source, flags.step)
  if not weights.tokenizer:
    raise UserError(
      f"{flags.source} has no tokenizer.json; copy the model's into it"
    )
  tokenizer = tokenizer_lib.parse(
    weights.tokenizer, f"{flags.source}: its tokenizer.json"
  )
  first = beginning(tokenizer, weights)
  rows = [first + encode(tokenizer, prompt) for prompt in flags.prompt]
  config = weights.model
  if max(map(max, rows)) >= config.vocab_size:
    raise UserError(
      f"{flags.source}: the tokenizer has more tokens than the model, which"
      f" has {config.vocab_size}; use the tokenizer of this model"
    )
  if flags.dtype:
    config = dataclasses.replace(
      config, dtype=flags.dtype, param_dtype=flags.dtype
    )
    weights = dataclasses.replace(weights, model=config)
  params = jax.device_put(llama_names.to_params(weights))
  chunks = stream(config, params, rows, flags.tokens, how, flags.seed)
  if len(rows) == 1:
    say(chunks, tokenizer, rows[0], weights.end_ids)
    return
  for ids, drawn in zip(rows, np.concatenate(list(chunks), 1), strict=True):
    continuation = until(drawn.tolist(), weights.end_ids)
    print(tokenizer.decode(ids + continuation), end="\n\n")


def main(argv: list[str] | None = None) -> int:
  """Runs the command: 0 done, 2 wrong input, 130 interrupted."""
  return commands.run(lambda: run(parse(argv)))


if __name__ == "__main__":
  sys.exit(main())
