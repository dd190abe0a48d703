"""Tables of examples: from the hub, from files or from a package."""

import glob
import pathlib
from collections.abc import Callable
from typing import Any, cast

import datasets

from train.common.errors import UserError
from train.config.schema import HUB, SharedDataConfig
from train.data import sources
from train.finetuning import packaged_datasets
from train.finetuning.tasks import PACKAGE

Table = datasets.Dataset
# Functions that read the splits, by name: a run reads only those it needs.
Splits = dict[str, Callable[[], Table]]
KINDS = ("csv", "json", "parquet")


def read(
  path: str,
  config: SharedDataConfig,
  validation: tuple[str, ...],
  cache: pathlib.Path,
) -> tuple[Table, dict[str, Table]]:
  """The training table, and the tables to evaluate by split.

  There are none of the latter where a part of the training table is to be held
  out.

  Args:
    path: a file, a folder, `hub:NAME:SUBSET` or `package:NAME`.
    config: `split` and `validation` choose the splits.
    validation: splits to evaluate if the config chooses none, as far as they
      exist.
    cache: folder for the files that `datasets` maps into memory.

  Raises:
    UserError: a file or a split is missing, or is not a table.
  """
  name = f"data.path {path}"
  folder = pathlib.Path(path).expanduser()
  if path.startswith(PACKAGE):
    splits = _package(path)
  elif path.startswith(HUB):
    splits = _hub(path, config, cache, name)
  elif folder.is_dir():
    splits = _folder(folder, cache, name)
  else:
    trained = {p.resolve() for p in sources.find_files(name, path)}
    evaluated = _validation_files(config.validation, cache, trained)
    return _files(path, cache, name), evaluated
  train = _pick(splits, config.split, name, "data.split")
  chosen = config.validation.split(",") if config.validation else []
  if config.split in chosen:
    raise UserError(
      f"data.validation={config.validation} names {config.split!r}, the"
      " training split; name another, or none to hold a part of it out"
    )
  if chosen == ["none"]:
    return train, {}
  if not chosen:
    chosen = [s for s in validation if s in splits and s != config.split]
  return train, {s: _pick(splits, s, name, "data.validation") for s in chosen}


def _pick(splits: Splits, split: str, name: str, field: str) -> Table:
  if split not in splits:
    raise UserError(
      f"{name} has no split {split!r} ({field}); its splits are"
      f" {', '.join(splits)}"
    )
  return splits[split]()


def _ready(tables: dict[str, Table]) -> Splits:
  return {name: lambda table=table: table for name, table in tables.items()}


def _package(path: str) -> Splits:
  with sources.quiet():
    return _ready(packaged_datasets.load(path.removeprefix(PACKAGE)))


def _hub(
  path: str, config: SharedDataConfig, cache: pathlib.Path, name: str
) -> Splits:
  repository, _, subset = path.removeprefix(HUB).partition(":")
  with sources.reading(name), sources.quiet():
    splits = datasets.load_dataset(
      repository,
      subset or None,
      revision=config.revision or None,
      cache_dir=str(cache),
    )
  return _ready(cast(Any, splits))


def _folder(folder: pathlib.Path, cache: pathlib.Path, name: str) -> Splits:
  """The splits that files are named for: `validation-00000.parquet`."""
  files: dict[str, list[pathlib.Path]] = {}
  for path in sources.find_files(name, str(folder)):
    if sources.kind_of(path) in KINDS:  # leaves out a README.md
      split = path.name.split(".")[0].split("-")[0]
      files.setdefault(split, []).append(path)

  def reader(split: str) -> Callable[[], Table]:
    return lambda: _read(files[split], cache, f"{name} ({split})")

  return {split: reader(split) for split in files}


def _files(pattern: str, cache: pathlib.Path, name: str) -> Table:
  return _read(sources.find_files(name, pattern), cache, name)


def _validation_files(
  validation: str, cache: pathlib.Path, trained: set[pathlib.Path]
) -> dict[str, Table]:
  """The tables in files to evaluate, by their names without extension."""
  if validation in ("", "none"):
    return {}
  evaluated: dict[str, Table] = {}
  for path in validation.split(","):
    stem = pathlib.Path(path).stem
    if stem in evaluated:
      raise UserError(
        f"data.validation={validation} names two files {stem!r}, whose scores"
        " would have the same name; rename one"
      )
    name = f"data.validation {path}"
    if trained & {p.resolve() for p in sources.find_files(name, path)}:
      raise UserError(
        f"{name} is also trained on; name another file, or none to hold a part"
        " of data.path out"
      )
    evaluated[stem] = _files(path, cache, name)
  return evaluated


def _read(paths: list[pathlib.Path], cache: pathlib.Path, name: str) -> Table:
  kinds = {sources.kind_of(path) for path in paths}
  if kinds - set(KINDS):
    raise UserError(
      f"{name}: {paths[0]} is not a table; examples are read from .csv, .tsv,"
      " .jsonl, .json and .parquet"
    )
  if len(kinds) > 1:
    raise UserError(f"{name} mixes {' and '.join(map(str, kinds))} files")
  (kind,) = kinds
  paths = [path for path in paths if sources.readable(name, path)]
  if not paths:
    raise UserError(f"{name} is empty; it needs examples")
  with sources.reading(name), sources.quiet():
    table = datasets.load_dataset(
      str(kind),
      # Escaped, so that a path is not read as a pattern.
      data_files=[glob.escape(str(path.resolve())) for path in paths],
      split="train",
      cache_dir=str(cache),
      **(_csv(paths[0]) if kind == "csv" else {}),
    )
  return cast(Table, table)


def _csv(path: pathlib.Path) -> dict[str, Any]:
  """Options for reading a .csv or .tsv file.

  Only an empty cell is a missing value: "None" and "NA" may be texts or names
  of classes. Cells of .tsv files are not quoted, as in GLUE's files.
  """
  options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
  if ".tsv" in path.name.lower():
    options |= {"sep": "\t", "quoting": 3}  # csv.QUOTE_NONE
  return options
