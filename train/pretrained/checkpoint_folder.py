"""Weights of a LLaMA in and out: Hugging Face folders, GGUF files, runs."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from orbax.checkpoint import v1 as ocp

import galore_optax
from train.common import atomic_files
from train.common.errors import UserError
from train.config import schema
from train.data import tokenizer
from train.models import llama
from train.pretrained import llama_names
from train.pretrained.llama_names import Weights
from train.run import run_dir
from train.step import adapters, train_step

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
# Files beside the weights that go along unread.
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SIDECARS = (GENERATION, TOKENIZER_CONFIG)


# Of the model's config, what is not the weights' but says how to compute.
OURS = ("dtype", "param_dtype", "weights", "unroll", "remat", "attention")


def load(path: pathlib.Path, step: int = 0) -> Weights:
  """Opens weights, whatever they are, without reading the tensors.

  Args:
    path: a folder of safetensors, a .gguf file, or a run's folder.
    step: the checkpoint of a run; 0: its newest.

  Raises:
    UserError: it is none of them, or another architecture.
  """
  if path.suffix == ".gguf":
    from train.pretrained import gguf

    return gguf.load(path)
  if not path.is_dir():
    raise UserError(
      f"{path} is no folder and no .gguf file; name a folder with {CONFIG}"
      " and safetensors, a .gguf file, or a run"
    )
  config = read_json(path / CONFIG)
  if "task.name" in config:
    raise UserError(
      f"{path} is the folder of a fine-tuning run; its weights are in"
      f" {path / 'model'}"
    )
  if "model.d_model" in config:
    return _load_run(path, config, step)
  return _load_folder(path, config)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A file that holds one JSON object.

  Raises:
    UserError: it cannot be read, or holds something else.
  """
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read ({error})") from None
  if not isinstance(found, dict):
    raise UserError(f"{path} holds no JSON object")
  return found


def _load_folder(path: pathlib.Path, config: dict[str, Any]) -> Weights:
  """Hugging Face's layout: one safetensors file, or shards and their index."""
  model = llama_names.model_from_hf(config, str(path / CONFIG))
  shapes, read = open_tensors(path)
  return Weights(
    source=str(path),
    model=model,
    shapes=shapes,
    read=read,
    tokenizer=_text(path / TOKENIZER),
    extra={
      name: read_json(path / name)
      for name in (CONFIG, *SIDECARS)
      if (path / name).exists()
    },
  )


def open_tensors(
  path: pathlib.Path,
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
  """A folder's tensors, of one safetensors file or of shards and their index.

  Returns:
    The shape of each by its name, and what reads one.

  Raises:
    UserError: there are none, or they cannot be read.
  """
  places = _places(path)
  handles = {file: _open(file) for file in set(places.values())}
  try:
    shapes = {
      name: tuple(handles[file].get_slice(name).get_shape())
      for name, file in places.items()
    }
  except safetensors.SafetensorError as error:
    raise UserError(
      f"{path / INDEX} does not fit its shards: {error}"
    ) from None
  return shapes, lambda name: handles[places[name]].get_tensor(name)


def _text(path: pathlib.Path) -> str:
  return path.read_text(encoding="utf-8") if path.exists() else ""


def _open(file: pathlib.Path) -> Any:
  try:
    return safetensors.safe_open(file, "np")
  except (OSError, safetensors.SafetensorError) as error:
    raise UserError(f"{file} cannot be read ({error})") from None


def _places(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """The file of each tensor."""
  if (path / INDEX).exists():
    index = read_json(path / INDEX).get("weight_map", {})
    return {name: path / file for name, file in index.items()}
  if (path / ONE).exists():
    return dict.fromkeys(_open(path / ONE).keys(), path / ONE)
  raise UserError(
    f"{path} has neither {ONE} nor {INDEX}; weights in PyTorch's own files"
    " (.bin, .pth) must be saved as safetensors first"
  )


def _load_run(path: pathlib.Path, config: dict[str, Any], step: int) -> Weights:
  """A run's checkpoint, whose parameters are read when they are asked for."""
  fields = {
    name.removeprefix("model."): value
    for name, value in config.items()
    if name.startswith("model.")
  }
  try:
    model = schema.ModelConfig(**fields)
  except TypeError as error:
    raise UserError(
      f"{path / CONFIG} is of another version ({error})"
    ) from None
  parts = _adapters(path, config)
  place = path / run_dir.FOLDER
  place /= str(step or _newest(place))
  text = _text(path / TOKENIZER)
  return llama_names.from_params(
    str(path),
    model,
    functools.cache(lambda: _restore(place, model, parts)),
    tokenizer=text,
    extra=_extra_of_run(path, text, config),
  )


def _adapters(
  path: pathlib.Path, config: dict[str, Any]
) -> adapters.Adapters | None:
  """What a run has trained in place of the weights."""
  fields = {
    name.removeprefix("optimizer."): value
    for name, value in config.items()
    if name.startswith("optimizer.")
  }
  try:
    return adapters.make(schema.OptimizerConfig(**fields))
  except TypeError as error:
    raise UserError(
      f"{path / CONFIG} is of another version ({error})"
    ) from None


def _extra_of_run(
  path: pathlib.Path, text: str, config: dict[str, Any]
) -> dict[str, dict]:
  """The token that ended its documents, and the length that was trained on."""
  length = config["data.length"]
  end, end_id = "", {}
  if text:
    end = _end_of_run(path, text, config)
    number = tokenizer.tokenizers.Tokenizer.from_str(text).token_to_id(end)
    end_id = {} if number is None else {"eos_token_id": number}
  return {
    CONFIG: {"max_position_embeddings": length, **end_id},
    "generation_config.json": end_id,
    "tokenizer_config.json": describe_tokenizer(end, length),
  }


def _end_of_run(path: pathlib.Path, text: str, config: dict[str, Any]) -> str:
  """The token that closed its documents; "" if nothing says it."""
  if (path / run_dir.TEXT).exists():
    return read_json(path / run_dir.TEXT)["end_token"]
  # A run of before that was written down.
  added = json.loads(text).get("added_tokens", [])
  names = {token["content"] for token in added}
  asked = config.get("data.end_token")
  known = [e for e in ([asked] if asked else tokenizer.ENDS) if e in names]
  return next(iter(known), "")


def describe_tokenizer(end: str, length: int) -> dict[str, Any]:
  """The tokenizer_config.json of a tokenizer.json; `end` may be ""."""
  return {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": length,
    "clean_up_tokenization_spaces": False,
    **({"eos_token": end} if end else {}),
  }


def _restore(
  place: pathlib.Path,
  model: schema.ModelConfig,
  parts: adapters.Adapters | None,
) -> dict:
  """Parameters alone, not the optimizer's state, as arrays on the host."""
  # In the host's memory: an accelerator may not hold them beside its work.
  host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
  store = parts.init if parts else functools.partial(train_step.store, model)
  kept = jax.eval_shape(store, nnx.to_pure_dict(llama.abstract(model)[1]))
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), kept
  )
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  try:
    with context:
      loaded = ocp.load_checkpointables(
        str(place.resolve()), {"state": {"params": params}}
      )
  # Orbax and its storage raise whatever a broken file makes them meet.
  except Exception as error:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    raise UserError(f"{place} cannot be read ({reason})") from None
  # What was trained in eight bits goes out as the weights it stands for.
  found = loaded["state"]["params"]
  if parts is not None:
    return parts.read(found)
  return galore_optax.dequantize_params(found, model.param_dtype)


def _newest(place: pathlib.Path) -> int:
  """The last complete checkpoint."""
  found = [int(p.name) for p in place.glob("*") if p.name.isdigit()]
  if not found:
    raise UserError(f"{place} holds no checkpoint; train the run first")
  return max(found)


def adopt(config: schema.Config, path: pathlib.Path) -> schema.Config:
  """The config of a run that goes on from given weights.

  Shape and tokenizer are theirs; how the model is computed and trained stays
  as in `config`.

  Raises:
    UserError: they cannot be read, do not fit their own config, or have no
      tokenizer.
  """
  if path.suffix == ".gguf":
    raise UserError(
      f"--from {path}: import it first, python -m train.hf import {path}"
      " --out FOLDER, and go on from the folder"
    )
  path = path.resolve()  # the run may be continued from another folder
  found = load(path)
  llama_names.check(found)
  if not found.tokenizer:
    raise UserError(f"--from {path} has no {TOKENIZER}; put it there")
  kept = {name: getattr(config.model, name) for name in OURS}
  end = found.extra.get("tokenizer_config.json", {}).get("eos_token", "")
  data = dataclasses.replace(
    config.data,
    tokenizer=str(path / TOKENIZER),
    end_token=end["content"] if isinstance(end, dict) else end or "",
  )
  return dataclasses.replace(
    config,
    model=dataclasses.replace(found.model, **kept),
    data=data,
    train=dataclasses.replace(config.train, init=str(path)),
  )


def initial_params(config: schema.Config) -> dict | None:
  """The weights that a run starts from, on the host; None: fresh ones.

  Raises:
    UserError: they are not of the shape that the run's model has.
  """
  if not config.train.init:
    return None
  found = load(pathlib.Path(config.train.init))
  return llama_names.to_params(dataclasses.replace(found, model=config.model))


def save(weights: Weights, out: pathlib.Path, dtype: str = "") -> None:
  """Writes a folder in Hugging Face's layout.

  Args:
    weights: the model.
    out: a new or empty folder.
    dtype: of the tensors; "": each as it is.

  Raises:
    UserError: the folder is not empty or cannot be written, or the weights
      do not fit their config.
  """
  llama_names.check(weights)
  with atomic_files.new_folder(out, "--out"):
    tensors = {}
    for name in llama_names.their_shapes(weights.model):
      tensor = weights.read(name)
      tensors[name] = (
        tensor.astype(llama_names.DTYPES[dtype]) if dtype else tensor
      )
    stored = {str(x.dtype) for x in tensors.values()}
    # "pt" is what transformers wants to be told, whoever wrote the file.
    safetensors.numpy.save_file(tensors, out / ONE, {"format": "pt"})
    for name, text in _texts(weights, stored.pop()).items():
      atomic_files.write_text(out / name, text)


def _texts(weights: Weights, dtype: str) -> dict[str, str]:
  """The files beside the tensors."""
  extra = weights.extra
  parts = {name: extra[name] for name in SIDECARS if extra.get(name)}
  kept = {
    name: value
    for name, value in extra.get(CONFIG, {}).items()
    if name.endswith("_token_id") or name == "max_position_embeddings"
  }
  parts[CONFIG] = llama_names.model_to_hf(weights.model, dtype, kept)
  texts = {
    name: json.dumps(part, indent=2) + "\n" for name, part in parts.items()
  }
  if weights.tokenizer:
    texts[TOKENIZER] = weights.tokenizer
  return texts
