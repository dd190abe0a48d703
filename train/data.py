"""From text to batches: load, split, tokenize, pack, shuffle.

The order of the training rows is a pure function of the seed and the step, so
a resumed run reads on exactly where it stopped without any saved position.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any, cast

import datasets
import numpy as np
import tokenizers

from train import files
from train import tokenizer as bpe
from train.config import DataConfig
from train.errors import UserError

CORPUS = pathlib.Path(__file__).parent / "corpus" / "sotu.jsonl.xz"
JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".txt.gz", ".txt.xz")


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Packed rows of token ids, training and held-out, and their tokenizer."""

  tokenizer: tokenizers.Tokenizer
  train: np.ndarray  # (rows, length + 1) int32
  held_out: np.ndarray  # (rows, length + 1) int32


def cache_folder(config: DataConfig) -> pathlib.Path:
  """Where tokenizers and tokenized text are kept between runs."""
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  folder = config.cache or pathlib.Path(base) / "galore_optax"
  return files.make_folder(pathlib.Path(folder), "data.cache")


def load_documents(config: DataConfig, cache: pathlib.Path) -> datasets.Dataset:
  """Reads the documents, one a row, in the order of the file.

  A JSON-lines file needs a `text` field; a plain text is cut into paragraphs
  at its blank lines.

  Args:
    config: its `path`, or the bundled corpus where that is empty.
    cache: folder for the files that `datasets` maps into memory.

  Returns:
    A dataset with the one column `text`.

  Raises:
    UserError: the file is missing, empty, not readable, or has no texts.
  """
  path = pathlib.Path(config.path or CORPUS).expanduser()
  _check_file(path)
  name = path.name.lower()
  options: Any = {
    "data_files": str(path),
    "split": "train",
    "cache_dir": str(cache),
  }
  if name.endswith(TEXT_SUFFIXES):
    options |= {"path": "text", "sample_by": "paragraph"}
  elif name.endswith(JSON_SUFFIXES):
    options |= {"path": "json"}
  else:
    raise UserError(
      f"data.path {path} ends in none of"
      f" {', '.join(TEXT_SUFFIXES + JSON_SUFFIXES)}"
    )
  try:
    with _quiet():
      documents = datasets.load_dataset(**options)
  except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
    reason = str(error.__cause__ or error).splitlines()[0]
    raise UserError(f"data.path {path} cannot be read: {reason}") from None
  return _texts(documents, path)


def _check_file(path: pathlib.Path) -> None:
  if not path.is_file():
    found = "is a folder" if path.is_dir() else "does not exist"
    raise UserError(f"data.path {path} {found}; name a .txt or .jsonl file")
  if not os.access(path, os.R_OK):
    raise UserError(f"data.path {path} may not be read by this user")
  if path.stat().st_size == 0:
    raise UserError(f"data.path {path} is empty; it needs text to train on")


def _texts(documents: datasets.Dataset, path: pathlib.Path) -> datasets.Dataset:
  """Keeps the `text` column and the rows in which it says something."""
  columns = documents.column_names
  if "text" not in columns:
    raise UserError(
      f"data.path {path} has no field 'text'; its fields are"
      f" {', '.join(columns)}"
    )
  kind = documents.features["text"].dtype
  if kind not in ("string", "large_string"):
    raise UserError(f"data.path {path}: 'text' holds {kind}, not strings")
  # The methods of `datasets` are annotated for a whole DatasetDict, too.
  documents = cast(datasets.Dataset, documents.select_columns(["text"]))
  with _quiet():
    kept = documents.filter(
      lambda texts: [bool(text and text.strip()) for text in texts],
      batched=True,
      input_columns="text",
    )
  if not len(kept):
    raise UserError(f"data.path {path} holds no text, only blank documents")
  return cast(datasets.Dataset, kept)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """No bars from `datasets`: the run has one progress bar of its own."""
  was_on = datasets.is_progress_bar_enabled()
  datasets.disable_progress_bars()
  try:
    yield
  finally:
    if was_on:
      datasets.enable_progress_bars()


def split(
  documents: datasets.Dataset, every: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
  """Training and held-out documents: one in `every` is held out.

  They lie evenly over the file (over the years, in the bundled corpus) and
  start in the middle of the first group, so that neither end of the file is
  favoured.

  Raises:
    UserError: fewer documents than it takes to hold one out.
  """
  count = len(documents)
  held_out = range(every // 2, count, every)
  if count < 2:
    raise UserError(
      "the data is a single document: nothing can be held out from it; give"
      " more documents (a .txt file is cut at its blank lines)"
    )
  if not held_out:
    raise UserError(
      f"data.holdout_every is {every}, but there are only {count} documents:"
      f" none would be held out; use {2 * count - 1} or less"
    )
  rest = [i for i in range(count) if i % every != every // 2]
  return (
    cast(datasets.Dataset, documents.select(rest)),
    cast(datasets.Dataset, documents.select(held_out)),
  )


def encode(
  documents: datasets.Dataset, tokenizer: tokenizers.Tokenizer
) -> np.ndarray:
  """All documents as one stream of ids (n,) int32, each closed by END."""
  end = tokenizer.token_to_id(bpe.END)

  def batch(texts: list[str]) -> dict[str, list]:
    encoded = tokenizer.encode_batch_fast(texts)
    return {"ids": [[*e.ids, end] for e in encoded]}

  with _quiet():
    tokens = documents.map(
      batch, batched=True, input_columns="text", remove_columns=["text"]
    )
  tokens = cast(datasets.Dataset, tokens)
  columns: Any = tokens.with_format("numpy", dtype=np.int32).iter(1000)
  return np.concatenate([ids for batch in columns for ids in batch["ids"]])


def pack(tokens: np.ndarray, length: int) -> np.ndarray:
  """Cuts the stream into rows of `length + 1`: inputs and their successors.

  No token is lost or used twice but the tail that fills no row.

  Args:
    tokens: (n,) ids.
    length: positions the model predicts in a row.

  Returns:
    (n // (length + 1), length + 1) ids.
  """
  rows = len(tokens) // (length + 1)
  return tokens[: rows * (length + 1)].reshape(rows, length + 1)


def prepare(config: DataConfig, vocab_size: int) -> Corpus:
  """Loads, splits, tokenizes and packs the text of a run.

  Raises:
    UserError: the text cannot be read, or is too short for one batch.
  """
  if vocab_size < bpe.MINIMUM:
    raise UserError(
      f"model.vocab_size is {vocab_size}; the byte-level tokenizer needs"
      f" {bpe.MINIMUM} or more"
    )
  cache = cache_folder(config)
  train, held_out = split(load_documents(config, cache), config.holdout_every)
  tokenizer, path, found = bpe.cached(list(train["text"]), vocab_size, cache)
  print(f"tokenizer  {'read from' if found else 'trained:'} {path}")
  corpus = Corpus(
    tokenizer,
    pack(encode(train, tokenizer), config.length),
    pack(encode(held_out, tokenizer), config.length),
  )
  _check_size(config, corpus)
  return corpus


def _check_size(config: DataConfig, corpus: Corpus) -> None:
  name = config.path or CORPUS
  tokens = corpus.train.size
  if len(corpus.train) < config.batch:
    raise UserError(
      f"data.path {name} gives {len(corpus.train)} rows of"
      f" {config.length + 1} tokens, fewer than one batch of"
      f" data.batch={config.batch}; lower data.batch or data.length, or give"
      f" more text than {tokens} tokens"
    )
  if not len(corpus.held_out):
    raise UserError(
      f"data.path {name}: the held-out documents do not fill one row of"
      f" data.length + 1 = {config.length + 1} tokens; lower data.length or"
      f" data.holdout_every, or give more text"
    )


def batch_at(rows: np.ndarray, batch: int, seed: int, step: int) -> np.ndarray:
  """The batch of a step, a pure function of its arguments.

  Every epoch goes through the rows once in an order of its own; the rows
  that fill no batch at its end wait for another epoch's order.

  Args:
    rows: (n, length + 1) packed rows.
    batch: rows to take.
    seed: with the epoch, decides the order.
    step: number of batches taken before, from 0.

  Returns:
    (batch, length + 1) rows.
  """
  epoch, index = divmod(step, len(rows) // batch)
  order = np.random.default_rng([seed, epoch]).permutation(len(rows))
  return rows[order[index * batch : (index + 1) * batch]]


def evaluation_batches(
  rows: np.ndarray, batch: int, limit: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Batches that cover the held-out rows, or `limit` of them, evenly spread.

  Yields:
    Rows (batch, length + 1) and weights (batch,) float32: the last batch is
    filled up with rows of weight 0, so that all batches have one shape.
  """
  rows = evaluation_rows(rows, limit)
  for start in range(0, len(rows), batch):
    part = rows[start : start + batch]
    weights = np.zeros(batch, np.float32)
    weights[: len(part)] = 1.0
    yield np.resize(part, (batch, rows.shape[1])), weights


def evaluation_rows(rows: np.ndarray, limit: int) -> np.ndarray:
  """At most `limit` of the held-out rows, evenly spread."""
  if len(rows) <= limit:
    return rows
  return rows[np.linspace(0, len(rows) - 1, limit).round().astype(int)]


def unigram_perplexity(
  train: np.ndarray, targets: np.ndarray, vocab_size: int
) -> float:
  """Perplexity of a model that knows only how often each token occurs.

  Frequencies are counted on the training rows, one added to each count so
  that no token is impossible.

  Args:
    train: training ids, any shape.
    targets: held-out ids to predict, any shape.
    vocab_size: number of possible ids.
  """
  counts = np.bincount(train.reshape(-1), minlength=vocab_size) + 1.0
  nll = np.log(counts.sum()) - np.log(counts)[targets]
  return float(np.exp(nll.mean()))
