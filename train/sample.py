"""Text from a model: `python -m train.sample RUN_OR_FOLDER --prompt ...`.

The prompts go through the model once, which fills a cache of keys and values;
then each new token costs one position. Both are one compiled program each:
their shapes do not depend on how far the text has come.
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

from train.common.errors import UserError
from train.config.schema import ModelConfig
from train.models import llama
from train.pretrained import llama_checkpoint, llama_names

CHUNK = 16  # tokens drawn before they are fetched and shown


class Sampling(NamedTuple):
  """How a token is drawn from the logits; each may be a traced number."""

  temperature: Any = 1.0  # divides the logits; 0: always the likeliest
  top_k: Any = 0  # so many likeliest tokens; 0: all
  top_p: Any = 1.0  # the fewest likeliest tokens whose probabilities reach it

  def check(self) -> "Sampling":
    """Itself, if it makes sense; raises UserError if not."""
    if not 0 <= self.temperature < float("inf"):
      raise UserError(f"--temperature is {self.temperature}; use 0 or above")
    if self.top_k < 0:
      raise UserError(f"--top-k is {self.top_k}; use 0 (all) or above")
    if not 0 < self.top_p <= 1:
      raise UserError(f"--top-p is {self.top_p}; it must lie in (0, 1]")
    return self


class Text(NamedTuple):
  """Rows under way, all of the same state of progress."""

  cache: llama.Cache
  length: jax.Array  # (B,): positions in the cache
  token: jax.Array  # (B,): the newest, not in the cache yet
  key: jax.Array


def draw(logits: jax.Array, how: Sampling, key: jax.Array) -> jax.Array:
  """One token a row.

  Args:
    logits: (B, V).
    how: temperature first, then top-k, then top-p among what is left.
    key: the random key; each row has its own stream.

  Returns:
    (B,) int32.
  """
  # Drawn in the order of their likelihood, so that of equal ones as many stay
  # as were asked for.
  order = jnp.argsort(logits, descending=True)
  scaled = jnp.take_along_axis(logits, order, 1)
  scaled = scaled / jnp.maximum(how.temperature, 1e-6)
  rank = jnp.arange(logits.shape[1])
  scaled = jnp.where((how.top_k == 0) | (rank < how.top_k), scaled, -jnp.inf)
  shares = jax.nn.softmax(scaled)
  before = jnp.cumsum(shares, axis=1) - shares
  # The first is kept whatever the rounding of the sums.
  kept = (before < how.top_p) | (rank == 0)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(logits)))
  place = jax.vmap(jax.random.categorical)(
    keys, jnp.where(kept, scaled, -jnp.inf)
  )
  place = jnp.where(how.temperature == 0, 0, place)
  return jnp.take_along_axis(order, place[:, None], 1)[:, 0].astype(jnp.int32)


def _next(
  config: ModelConfig, params: dict, x: jax.Array, text: Text, how: Sampling
) -> Text:
  """Draws the token after the last position, whose features (B, D) are x."""
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
  """Takes the prompts in and draws the token after each.

  Args:
    config: the model's.
    params: its parameters.
    prompts: (B, P) ids, filled up at the end with any token: a place that is
      filled up is written over before a position that sees it is.
    lengths: (B,) tokens of each prompt, at least 1.
    room: positions of the cache.
    how: how tokens are drawn.
    key: the random key.
  """
  rows, width = prompts.shape
  cache = llama.empty_cache(config, rows, room)
  places = jnp.broadcast_to(jnp.arange(width), prompts.shape)
  x, cache = llama.extend(config, params, prompts, places, cache)
  last = x.reshape(rows, width, -1)[jnp.arange(rows), lengths - 1]
  text = Text(cache, lengths, jnp.zeros(rows, jnp.int32), key)
  return _next(config, params, last, text, how)


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def decode(
  config: ModelConfig, params: dict, text: Text, how: Sampling, count: int
) -> tuple[Text, jax.Array]:
  """Draws `count` tokens a row after the newest.

  Returns:
    The text, and the tokens (B, count) that were the newest in turn: the one
    that came in first, the one that goes out in `text` not yet.
  """

  def step(text: Text, _: None) -> tuple[Text, jax.Array]:
    x, cache = llama.extend(
      config, params, text.token[:, None], text.length[:, None], text.cache
    )
    moved = text._replace(cache=cache, length=text.length + 1)
    return _next(config, params, x, moved, how), text.token

  text, tokens = jax.lax.scan(step, text, length=count)
  if not jax.sharding.get_abstract_mesh().empty:
    # So that every process of several can read them.
    whole = jax.sharding.PartitionSpec()
    tokens = jax.lax.with_sharding_constraint(tokens, whole)
  return text, tokens.T


def stream(
  config: ModelConfig,
  params: dict,
  prompts: Sequence[Sequence[int]],
  count: int,
  how: Sampling,
  seed: int,
) -> Iterator[np.ndarray]:
  """Continues each prompt by `count` tokens, some at a time.

  Args:
    config: the model's.
    params: its parameters.
    prompts: token ids, one sequence a row, of any lengths from 1.
    count: tokens to draw.
    how: how they are drawn.
    seed: of the random numbers.

  Yields:
    (B, n) int32 ids that follow those before.
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
  """The `count` tokens that follow each prompt, (B, count) int32."""
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
  """The prompt with `count` more tokens, as text."""
  ids = encode(tokenizer, prompt)
  drawn = generate(config, params, [ids], count, how, seed)[0]
  return tokenizer.decode(ids + drawn.tolist())


def encode(tokenizer: tokenizers.Tokenizer, prompt: str) -> list[int]:
  """The prompt's tokens.

  Raises:
    UserError: there are none.
  """
  # As the training text was encoded: nothing is put before or after it.
  ids = tokenizer.encode(prompt, add_special_tokens=False).ids
  if not ids:
    raise UserError(f"the prompt {prompt!r} has no tokens; give it a few words")
  return ids


def beginning(
  tokenizer: tokenizers.Tokenizer, found: llama_names.Weights
) -> list[int]:
  """The token that a text begins with, where config and tokenizer say so."""
  token = found.extra.get("config.json", {}).get("bos_token_id")
  put = tokenizer.encode("a").ids[:1]
  return put if put == [token] else []


def say(
  chunks: Iterator[np.ndarray],
  tokenizer: tokenizers.Tokenizer,
  ids: list[int],
  ends: Sequence[int],
) -> None:
  """Prints one text as it grows, to its end token at most."""
  shown = ""
  for chunk in chunks:
    new = chunk[0].tolist()
    end = next((i for i, token in enumerate(new) if token in ends), None)
    ids = ids + new[:end]
    text = tokenizer.decode(ids)
    # A character of several tokens is not whole yet where a text ends in it.
    whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
    print(whole[len(shown) :], end="", flush=True)
    shown = whole
    if end is not None:
      break
  print()


def until(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
  """The tokens before the first that ends a text."""
  return list(itertools.takewhile(lambda token: token not in ends, ids))


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m train.sample",
    description="Continues prompts with a trained model.",
  )
  parser.add_argument(
    "source",
    type=pathlib.Path,
    metavar="RUN_OR_FOLDER",
    help="a run, a folder of LLaMA safetensors, or a .gguf file",
  )
  parser.add_argument(
    "--prompt", action="append", required=True, help="may be repeated"
  )
  parser.add_argument("--tokens", type=int, default=100, help="to draw")
  parser.add_argument("--temperature", type=float, default=0.8)
  parser.add_argument("--top-k", type=int, default=0, help="0: all")
  parser.add_argument("--top-p", type=float, default=1.0)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--step", type=int, default=0, help="checkpoint of a run; 0: the newest"
  )
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    default="",
    help="of weights and computation; default: the run's, else float32",
  )
  return parser.parse_args(words)


def run(flags: argparse.Namespace) -> None:
  """Reads the model and prints the texts."""
  how = Sampling(flags.temperature, flags.top_k, flags.top_p).check()
  if flags.tokens < 1:
    raise UserError(f"--tokens is {flags.tokens}; use 1 or more")
  found = llama_checkpoint.load(flags.source, flags.step)
  if not found.tokenizer:
    raise UserError(f"{flags.source} has no tokenizer.json; put it there")
  tokenizer = tokenizers.Tokenizer.from_str(found.tokenizer)
  first = beginning(tokenizer, found)
  rows = [first + encode(tokenizer, prompt) for prompt in flags.prompt]
  config = found.model
  if max(map(max, rows)) >= config.vocab_size:
    raise UserError(
      f"{flags.source}: the tokenizer has more entries than the model's"
      f" {config.vocab_size}; they do not belong together"
    )
  if flags.dtype:
    config = dataclasses.replace(
      config, dtype=flags.dtype, param_dtype=flags.dtype
    )
    found = dataclasses.replace(found, model=config)
  params = jax.device_put(llama_names.to_params(found))
  chunks = stream(config, params, rows, flags.tokens, how, flags.seed)
  if len(rows) == 1:
    say(chunks, tokenizer, rows[0], found.end_ids)
    return
  for ids, drawn in zip(rows, np.concatenate(list(chunks), 1), strict=True):
    kept = until(drawn.tolist(), found.end_ids)
    print(tokenizer.decode(ids + kept), end="\n\n")


def main(words: list[str] | None = None) -> int:
  """The command: 0 done, 2 wrong input."""
  try:
    run(parse_arguments(words))
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
