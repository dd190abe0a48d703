"""Loads the weights of a LLaMA, from any source, and saves them.

A source is a checkpoint folder of Hugging Face, a GGUF file, or the folder of
a pre-training run.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from train.common import atomic_files, inputs
from train.common.errors import UserError
from train.common.fields import Fields
from train.config import schema
from train.pretrained import (
  checkpoint_folder,
  llama_config,
  llama_names,
  mapping,
  run_weights,
)
from train.pretrained.checkpoint_folder import CONFIG, SIDECARS, TOKENIZER
from train.pretrained.llama_names import Weights
from train.pretrained.mapping import DTYPES

# Fields of the model's config that say how it is computed and stored. A
# checkpoint does not have them: they stay as the run's config has them.
OURS = ("dtype", "param_dtype", "weights", "unroll", "remat", "attention")


def load(path: pathlib.Path, step: int = 0) -> Weights:
  """Opens the weights of a LLaMA; no tensor is read yet.

  Args:
    path: a folder with safetensors, a .gguf file, or a run's folder.
    step: of a run's checkpoint; 0: the newest.

  Raises:
    UserError: it is none of these, or another architecture.
  """
  if path.suffix == ".gguf":
    from train.pretrained import gguf

    return gguf.load(path)
  if not path.is_dir():
    raise UserError(
      f"{path} is neither a folder nor a .gguf file; name a folder with"
      f" {CONFIG} and safetensors, a .gguf file, or a run"
    )
  config = inputs.read_object(path / CONFIG)
  if "task.name" in config:
    raise UserError(
      f"{path} is the folder of a fine-tuning run; its weights are in"
      f" {path / 'model'}"
    )
  if run_weights.is_run(config):
    return run_weights.load(path, config, step)
  return _load_folder(path, config)


def _load_folder(path: pathlib.Path, config: dict[str, Any]) -> Weights:
  model = llama_config.from_hf(config, str(path / CONFIG))
  shapes, read = checkpoint_folder.open_tensors(path)
  llama_names.check_layers(model, len(shapes), str(path / CONFIG))
  return Weights(
    source=str(path),
    model=model,
    shapes=shapes,
    read=read,
    tokenizer=checkpoint_folder.read_text(path / TOKENIZER),
    extra=checkpoint_folder.read_sidecars(path, (CONFIG, *SIDECARS)),
  )


def adopt(
  config: schema.Config, path: pathlib.Path, tokenizer: str = ""
) -> schema.Config:
  """The config of a run that starts from pretrained weights.

  The sizes of the model and the tokenizer are those of the weights. How the
  model is computed and trained stays as in `config`.

  Args:
    config: the run without the weights.
    path: the folder of the weights.
    tokenizer: what data.tokenizer is set to, in place of the weights' own.

  Raises:
    UserError: the weights cannot be read, do not fit their own config, or
      have no tokenizer.
  """
  if path.suffix == ".gguf":
    raise UserError(
      f"--from {path}: convert the file first, python -m train.hf import"
      f" {path} --out FOLDER, and use --from FOLDER"
    )
  path = path.resolve()  # the run may be resumed from another directory
  weights = load(path)
  llama_names.check(weights)
  if not weights.tokenizer and not tokenizer:
    raise UserError(
      f"--from {path} has no {TOKENIZER}; put it there, or name the model's"
      f" tokenizer{_sentencepiece(path)} with --set data.tokenizer=FILE"
    )
  ours = {name: getattr(config.model, name) for name in OURS}
  name = checkpoint_folder.TOKENIZER_CONFIG
  described = Fields(str(path / name), weights.extra.get(name, {}))
  data = dataclasses.replace(
    config.data,
    tokenizer=tokenizer or str(path / TOKENIZER),
    end_token=described.token("eos_token"),
  )
  return dataclasses.replace(
    config,
    model=dataclasses.replace(weights.model, **ours),
    data=data,
    train=dataclasses.replace(config.train, init=str(path)),
  )


def _sentencepiece(path: pathlib.Path) -> str:
  """The folder's SentencePiece file, for a message; "" if it has none."""
  file = path / "tokenizer.model"
  return f", such as {file}," if file.is_file() else ""


def initial_params(config: schema.Config) -> dict | None:
  """The pretrained weights that a run starts from, on the host.

  Returns:
    Our parameters as nested dicts; None if the run starts from random ones.

  Raises:
    UserError: the shapes are not those of the run's model.
  """
  if not config.train.init:
    return None
  weights = load(pathlib.Path(config.train.init))
  return llama_names.to_params(dataclasses.replace(weights, model=config.model))


def save(weights: Weights, out: pathlib.Path, dtype: str = "") -> None:
  """Writes a checkpoint folder that `transformers` and `load` read.

  Args:
    weights: the model.
    out: a new or empty folder.
    dtype: of the tensors; "": each keeps its own.

  Raises:
    UserError: the folder is not empty or cannot be written, or the weights
      do not fit their config.
  """
  llama_names.check(weights)
  with atomic_files.new_folder(out, "the output folder"):
    tensors = {}
    for name in llama_names.tensors(weights.model):
      tensor = weights.read(name)
      with np.errstate(over="ignore"):  # found below
        tensor = tensor.astype(DTYPES[dtype]) if dtype else tensor
      mapping.check_finite(tensor, name, weights.source)
      tensors[name] = tensor
    stored = str(next(iter(tensors.values())).dtype)
    checkpoint_folder.write(
      out, tensors, _files(weights, stored), weights.tokenizer
    )


def _files(weights: Weights, dtype: str) -> dict[str, dict[str, Any]]:
  """The JSON files beside the tensors."""
  extra = weights.extra
  copied = {
    name: value
    for name, value in extra.get(CONFIG, {}).items()
    if name.endswith("_token_id") or name == "max_position_embeddings"
  }
  files = {name: extra[name] for name in SIDECARS if extra.get(name)}
  files[CONFIG] = llama_config.to_hf(weights.model, dtype, copied)
  return files
