"""Loads text by name: local files, a data set of the hub, the bundled corpus.

Every source becomes a dataset with a column of strings, either in memory
(`datasets.Dataset`) or read on demand (`datasets.IterableDataset`).
"""

import codecs
import contextlib
import dataclasses
import glob
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any, cast

import datasets
import fsspec

from train.common import hub
from train.common.errors import UserError, first_line
from train.config.schema import HUB, DataConfig

CORPUS = pathlib.Path(__file__).parent / "sotu" / "sotu.jsonl.xz"
KINDS = {
  "text": (".txt", ".text", ".md"),
  "json": (".jsonl", ".json", ".ndjson"),
  "csv": (".csv", ".tsv"),
  "parquet": (".parquet",),
}
COMPRESSED = (".gz", ".xz", ".bz2", ".zst", ".lz4")  # of single files
Documents = datasets.Dataset | datasets.IterableDataset


@dataclasses.dataclass(frozen=True)
class Source:
  """Documents to train on and, if given, documents to evaluate on."""

  name: str  # the source, as messages call it
  field: str  # the column that holds the text
  train: Documents
  held_out: Documents | None  # None: to be held out from `train`

  @property
  def streamed(self) -> bool:
    """Whether the documents are read on demand."""
    return isinstance(self.train, datasets.IterableDataset)


def streams(config: DataConfig) -> bool:
  """Whether `config` asks to stream; `auto` streams data sets of the hub."""
  if config.stream == "auto":
    return config.path.startswith(HUB)
  return config.stream == "true"


def load(config: DataConfig, cache: pathlib.Path) -> Source:
  """Opens the documents that `config` names.

  Args:
    config: `path` is empty (the bundled corpus), a file, a folder, a glob,
      `hub:NAME` or `hub:NAME:SUBSET`.
    cache: folder for the files that `datasets` maps into memory.

  Returns:
    The source, with its documents in the order of the files.

  Raises:
    UserError: the source does not exist, cannot be reached or read, has no
      text, or has no such split, subset or field.
  """
  if config.path.startswith(HUB):
    return _load_hub(config, cache)
  field = config.text_field
  options = {"cache": cache, "stream": streams(config), "config": config}
  name = f"data.path {config.path or CORPUS}"
  train = _load_files(name, config.path or str(CORPUS), **options)
  held_out = None
  if config.validation and config.validation != "none":
    held_name = f"data.validation {config.validation}"
    held_out = _load_files(held_name, config.validation, **options)
    held_out = _texts(held_out, held_name, field)
  return Source(name, field, _texts(train, name, field), held_out)


def find_files(name: str, pattern: str) -> list[pathlib.Path]:
  """The files of a path, a folder or a glob, sorted.

  A folder stands for all files of a known kind in it, at any depth, except
  hidden files and files in hidden folders.
  """
  path = pathlib.Path(pattern).expanduser()
  if path.is_dir():
    files = [p for p in path.rglob("*") if p.is_file() and kind_of(p)]
    files = [p for p in files if not _hidden(p.relative_to(path))]
    missing = f"{name} is a folder without files that end in {_endings()}"
  elif path.exists():
    files, missing = [path], ""
  elif glob.has_magic(pattern):
    matches = glob.glob(str(path), recursive=True)
    files = [p for p in map(pathlib.Path, matches) if p.is_file()]
    missing = f"{name} matches no file; quote a glob to pass it unexpanded"
  else:
    files, missing = [], f"{name} does not exist; name a file, folder or glob"
  if not files:
    raise UserError(missing)
  return sorted(files)


def _hidden(path: pathlib.Path) -> bool:
  return any(part.startswith(".") for part in path.parts)


def kind_of(path: pathlib.Path) -> str | None:
  """The builder of `datasets` for a file, by its extension."""
  name = path.name.lower()
  for kind, endings in KINDS.items():
    for ending in endings:
      compressed = tuple(ending + suffix for suffix in COMPRESSED)
      if name.endswith(ending) or (
        kind != "parquet" and name.endswith(compressed)
      ):
        return kind
  return None


def _endings() -> str:
  known = [ending for endings in KINDS.values() for ending in endings]
  return f"{', '.join(known)} (or these with {', '.join(COMPRESSED)})"


def _load_files(
  name: str,
  pattern: str,
  *,
  cache: pathlib.Path,
  stream: bool,
  config: DataConfig,
) -> Documents:
  paths = find_files(name, pattern)
  kinds = {kind_of(path): path for path in reversed(paths)}
  if None in kinds:
    raise UserError(
      f"{name}: {kinds[None]} does not end in any of {_endings()}"
    )
  if len(kinds) > 1:
    examples = " and ".join(str(path) for path in kinds.values())
    raise UserError(
      f"{name} holds files of several kinds, such as {examples}; select one"
      " kind with a glob"
    )
  paths = [path for path in paths if readable(name, path)]
  if not paths:
    raise UserError(f"{name} is empty; it must have text to train on")
  (kind,) = kinds
  # Escaped, because `datasets` would read a file's name as a pattern.
  options: dict[str, Any] = {
    "path": kind,
    "data_files": [glob.escape(str(path.resolve())) for path in paths],
    "split": "train",
    "streaming": stream,
    "cache_dir": str(cache),
  }
  if kind == "text":
    sample_by = {"file": "document"}.get(config.documents, config.documents)
    options["sample_by"] = sample_by
  if kind == "csv" and ".tsv" in paths[0].name.lower():
    options["sep"] = "\t"
  with reading(name), quiet():
    documents = datasets.load_dataset(**options)
    if kind == "text" and any(map(_has_mark, paths)):
      documents = documents.map(_without_mark)
    return documents


def _without_mark(row: dict[str, str]) -> dict[str, str]:
  return {"text": row["text"].removeprefix("\ufeff")}


def _has_mark(path: pathlib.Path) -> bool:
  """Whether a text file begins with a byte-order mark."""
  opened = fsspec.open(str(path), "rb", compression="infer")
  with cast(fsspec.core.OpenFile, opened) as file:
    return file.read(3) == codecs.BOM_UTF8


def readable(name: str, path: pathlib.Path) -> bool:
  """Whether a file has content; empty shards are skipped."""
  if not os.access(path, os.R_OK):
    raise UserError(f"{name}: this user has no permission to read {path}")
  return path.stat().st_size > 0


def _load_hub(config: DataConfig, cache: pathlib.Path) -> Source:
  name, _, subset = config.path.removeprefix(HUB).partition(":")
  options: dict[str, Any] = {
    "path": name,
    "name": subset or None,
    "revision": config.revision or None,
    "streaming": streams(config),
    "cache_dir": str(cache),
  }
  label = f"data.path {config.path}"
  with reading(label), quiet():
    splits = datasets.load_dataset(**options)
  train = _split(splits, config.split, label, "data.split")
  wanted = config.validation
  if not wanted:
    # A split named "validation" is not used if it is trained on.
    free = config.split != "validation" and "validation" in splits
    wanted = "validation" if free else "none"
  if wanted == config.split:
    raise UserError(
      f"data.validation and data.split are both {wanted!r}; evaluate on"
      " another split, or use data.validation=none"
    )
  field = config.text_field
  held_out = None
  if wanted != "none":
    held_out = _split(splits, wanted, label, "data.validation")
    held_out = _texts(held_out, label, field)
  return Source(label, field, _texts(train, label, field), held_out)


def _split(splits: Any, name: str, label: str, option: str) -> Documents:
  if name not in splits:
    raise UserError(
      f"{label} has no split {name!r} ({option}); its splits are"
      f" {', '.join(splits)}"
    )
  return splits[name]


def _texts(documents: Documents, name: str, field: str) -> Documents:
  """Checks the column of the text; drops blank documents if in memory."""
  if isinstance(documents, datasets.IterableDataset):
    if documents.features is not None:
      check_field(dict(documents.features), name, field)
    return documents
  check_field(dict(documents.features), name, field)
  documents = cast(datasets.Dataset, documents.select_columns([field]))
  if field != "text":
    documents = documents.rename_column(field, "text")
  with reading(name), quiet():
    filled = documents.filter(
      lambda texts: [not blank(text) for text in texts],
      batched=True,
      input_columns="text",
    )
  if not len(filled):
    raise UserError(f"{name} has no text, only blank documents")
  return cast(datasets.Dataset, filled)


def blank(text: str | None) -> bool:
  """Whether a document is missing, empty, or white space only."""
  return not text or text.isspace()


def check_field(types: dict[str, Any], name: str, field: str) -> None:
  """Raises unless `field` is among the columns and holds strings.

  Args:
    types: the type of each column, by name.
    name: the source, as messages call it.
    field: the column of the text.
  """
  if field not in types:
    raise UserError(
      f"{name} has no field {field!r}; its fields are {', '.join(types)}:"
      " name one with data.text_field"
    )
  kind = str(getattr(types[field], "dtype", types[field]))
  # A column in which all values so far are missing has the type null.
  if kind not in ("string", "large_string", "string_view", "null"):
    raise UserError(f"{name}: the field {field!r} holds {kind}, not strings")


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
  """Turns errors of `datasets` into one sentence that names the source.

  Any exception is caught, because its readers raise many types. So nothing but
  calls of `datasets` belongs in the `with` block.
  """
  try:
    with _without_log():
      yield
  except datasets.exceptions.DatasetNotFoundError as error:
    if "gated" in str(error):
      advice = hub.GATED
    else:
      advice = "is not on the hub, or is private; check the name"
    raise UserError(f"{name} {advice}") from error
  except (ConnectionError, TimeoutError) as error:
    raise UserError(hub.unreachable(name, error)) from error
  except Exception as error:
    if "BuilderConfig" in str(error) or "Config name" in str(error):
      known = " ".join(str(error).splitlines()[:2])
      raise UserError(
        f"{name}: {known} A subset is written {HUB}NAME:SUBSET"
      ) from error
    reason = first_line(error.__cause__ or error)
    raise UserError(f"{name} cannot be read: {reason}") from error


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
  """Keeps `datasets` from logging errors that it also raises."""
  logger = logging.getLogger("datasets")
  level = logger.level
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    logger.setLevel(level)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Hides the progress bars of `datasets`: a run has a bar of its own."""
  was_on = datasets.is_progress_bar_enabled()
  datasets.disable_progress_bars()
  try:
    yield
  finally:
    if was_on:
      datasets.enable_progress_bars()
