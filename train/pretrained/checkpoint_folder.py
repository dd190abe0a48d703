"""Reads and writes checkpoint folders in the layout of Hugging Face.

A folder holds config.json, the weights as safetensors (one file, or several
and an index), a tokenizer, and a few small files beside them.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import huggingface_hub
import numpy as np
import safetensors
import safetensors.numpy

from train.common import atomic_files, hub, inputs
from train.common.errors import UserError
from train.common.fields import Fields, is_text, shown
from train.config.schema import HUB
from train.pretrained.mapping import Reader, Shape

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
# Files that are copied from folder to folder without being interpreted.
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SIDECARS = (GENERATION, TOKENIZER_CONFIG)
# The chat template, where it is not in TOKENIZER_CONFIG.
CHAT_TEMPLATE = "chat_template.jinja"
# The files of a repository that are downloaded: no weights in other formats.
DOWNLOADED = (
  CONFIG,
  WEIGHTS,
  INDEX,
  "model-*.safetensors",
  TOKENIZER,
  CHAT_TEMPLATE,
  *SIDECARS,
  "vocab.txt",
  "vocab.json",
  "merges.txt",
)


def fetch(path: str) -> pathlib.Path:
  """The folder of a checkpoint; downloads it first if it is `hub:NAME`.

  Raises:
    UserError: there is no such folder, or the repository cannot be
      downloaded.
  """
  if path.startswith(HUB):
    with hub.fetching(path):
      return pathlib.Path(
        huggingface_hub.snapshot_download(
          path.removeprefix(HUB), allow_patterns=list(DOWNLOADED)
        )
      )
  folder = pathlib.Path(path).expanduser()
  if not folder.is_dir():
    raise UserError(
      f"{folder} is not a folder; name a folder with {CONFIG}, safetensors and"
      f" a tokenizer, or {HUB}NAME"
    )
  return folder


def read_text(path: pathlib.Path) -> str:
  """The text of a file; "" if it does not exist.

  Raises:
    UserError: it cannot be read, or is empty.
  """
  if not path.exists() and not path.is_symlink():
    return ""
  text = inputs.read_text(path)
  if not text.strip():
    raise UserError(f"{path} is empty; put the model's own there, or delete it")
  return text


def read_sidecars(
  path: pathlib.Path, names: Iterable[str]
) -> dict[str, dict[str, Any]]:
  """The contents of those JSON files that a folder has, by their names.

  A chat template in a file of its own is put where other folders have it.

  Raises:
    UserError: one cannot be read, or a field that is used later has a wrong
      type.
  """
  found = {
    name: inputs.read_object(path / name)
    for name in names
    if (path / name).exists()
  }
  for name, content in found.items():
    _check_sidecar(Fields(str(path / name), content))
  template = read_text(path / CHAT_TEMPLATE)
  if template and TOKENIZER_CONFIG in names:
    described = found.get(TOKENIZER_CONFIG, {})
    found[TOKENIZER_CONFIG] = described | {"chat_template": template}
  return found


def _check_sidecar(fields: Fields) -> None:
  """Checks the fields that are read, or copied, whichever file has them."""
  for name in ("bos_token_id", "eos_token_id"):
    fields.integers(name, ())
  for name in ("bos_token", "eos_token"):
    fields.token(name)
  fields.flag("add_bos_token", None)


def open_tensors(path: pathlib.Path) -> tuple[dict[str, Shape], Reader]:
  """Opens the safetensors of a folder; only their headers are read.

  Returns:
    The shape of each tensor by name, and a function that reads one tensor.

  Raises:
    UserError: the folder has no safetensors, or they cannot be read.
  """
  files = _files(path)
  handles = {file: _open(file) for file in set(files.values())}
  with inputs.refusing(f"{path / INDEX} does not fit the files that it lists"):
    shapes = {
      name: tuple(handles[file].get_slice(name).get_shape())
      for name, file in files.items()
    }
  return shapes, lambda name: _read(handles[files[name]], name, files[name])


# The dtypes of weights, by their names in safetensors.
DTYPES = ("F64", "F32", "F16", "BF16")


def _read(handle: Any, name: str, file: pathlib.Path) -> np.ndarray:
  """A tensor of weights; integers and scaled formats are none."""
  dtype = handle.get_slice(name).get_dtype()
  if dtype not in DTYPES:
    raise UserError(
      f"{file}: the tensor {name!r} has dtype {dtype}; weights are read in"
      f" {', '.join(DTYPES)}. Convert quantized weights to one of these first"
    )
  with inputs.refusing(f"{file}: the tensor {name!r} cannot be read"):
    return handle.get_tensor(name)


def _open(file: pathlib.Path) -> Any:
  inputs.check_regular(file)
  with inputs.refusing(f"{file} cannot be read"):
    return safetensors.safe_open(file, "np")


def _files(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """The file that holds each tensor, by the tensor's name."""
  if (path / WEIGHTS).exists():  # also beside an index, as in transformers
    return dict.fromkeys(_open(path / WEIGHTS).keys(), path / WEIGHTS)
  if (path / INDEX).exists():
    index = _index(path / INDEX)
    return {name: path / file for name, file in index.items()}
  raise UserError(
    f"{path} has neither {WEIGHTS} nor {INDEX}; convert weights in PyTorch's"
    " formats (.bin, .pth) to safetensors first"
  )


def _index(source: pathlib.Path) -> dict[str, str]:
  """The files of tensors by their names, all of them beside the index."""
  index = inputs.read_object(source).get("weight_map")
  if not isinstance(index, dict):
    raise UserError(
      f"{source}: weight_map must be an object that gives the file of each"
      f" tensor, got {shown(index)}"
    )
  for name, file in index.items():
    if not is_text(file) or pathlib.PurePath(file).name != file:
      raise UserError(
        f"{source}: the file of {name!r} is {file!r}; it must be the name of a"
        " file in the same folder"
      )
  return index


def tokenizer_config(max_length: int, **fields: Any) -> dict[str, Any]:
  """The tokenizer_config.json that belongs to a tokenizer.json.

  Args:
    max_length: positions of the model.
    **fields: special tokens by their roles, and other fields.
  """
  return {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": max_length,
    **fields,
  }


def write(
  folder: pathlib.Path,
  tensors: dict[str, np.ndarray],
  files: Mapping[str, Mapping[str, Any]],
  tokenizer: str,
) -> None:
  """Writes a checkpoint into an empty folder.

  Args:
    folder: exists and is empty.
    tensors: the weights, by the names of Hugging Face.
    files: contents of the JSON files, by file name.
    tokenizer: the text of tokenizer.json; "": none is written.
  """
  # transformers asks for the format "pt", whichever library wrote the file.
  path = folder / WEIGHTS
  with inputs.refusing(f"{path} cannot be written"):
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})
  for name, content in files.items():
    text = json.dumps(content, indent=2) + "\n"
    atomic_files.write_text(folder / name, text)
  if tokenizer:
    atomic_files.write_text(folder / TOKENIZER, tokenizer)
