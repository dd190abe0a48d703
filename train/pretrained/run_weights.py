"""Reads the weights of a pre-training run from its checkpoints."""

import functools
import json
import pathlib
from typing import Any, TypeVar

import jax
import numpy as np
import tokenizers
from flax import nnx
from orbax.checkpoint import v1 as ocp

import galore_optax
from train.common.errors import UserError, first_line
from train.config import schema
from train.data import tokenizer
from train.models import llama
from train.pretrained import checkpoint_folder, llama_names
from train.pretrained.llama_names import Weights
from train.run import checkpoint as checkpoint_lib
from train.run import checksums, run_dir
from train.step import adapters, train_step

Group = TypeVar("Group", schema.ModelConfig, schema.OptimizerConfig)


def is_run(config: dict[str, Any]) -> bool:
  """Whether a config.json is that of a run, not that of Hugging Face."""
  return "model.d_model" in config


def load(path: pathlib.Path, config: dict[str, Any], step: int = 0) -> Weights:
  """Opens a run; its parameters are restored when the first is read.

  Args:
    path: the run's folder.
    config: its config.json.
    step: of the checkpoint; 0: the newest.

  Raises:
    UserError: there is no checkpoint, or another version wrote the config.
  """
  model = _group(schema.ModelConfig, "model.", config, path)
  method = _group(schema.OptimizerConfig, "optimizer.", config, path)
  parts = adapters.make(method)
  checkpoints = path / run_dir.FOLDER
  checkpoint = checkpoints / str(step or _newest(checkpoints))
  text = checkpoint_folder.read_text(path / checkpoint_folder.TOKENIZER)
  return llama_names.from_params(
    str(path),
    model,
    functools.cache(lambda: _restore(checkpoint, model, parts)),
    tokenizer=text,
    extra=_extra(path, text, config),
  )


def _group(
  kind: type[Group], prefix: str, config: dict[str, Any], path: pathlib.Path
) -> Group:
  """One group of a run's config, from its flat fields."""
  fields = {
    name.removeprefix(prefix): value
    for name, value in config.items()
    if name.startswith(prefix)
  }
  try:
    return kind(**fields)
  except TypeError as error:
    raise UserError(
      f"{path / checkpoint_folder.CONFIG} was written by another version"
      f" ({error})"
    ) from None


def _newest(checkpoints: pathlib.Path) -> int:
  """The step of the last complete checkpoint."""
  steps = [int(p.name) for p in checkpoints.glob("*") if p.name.isdigit()]
  if not steps:
    raise UserError(f"{checkpoints} holds no checkpoint; train the run first")
  return max(steps)


def _restore(
  checkpoint: pathlib.Path,
  model: schema.ModelConfig,
  parts: adapters.Adapters | None,
) -> dict:
  """Restores the parameters without the optimizer's state, on the host."""
  # In the host's memory: an accelerator may have no room for a second copy.
  host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
  store = parts.init if parts else functools.partial(train_step.store, model)
  stored = jax.eval_shape(store, nnx.to_pure_dict(llama.abstract(model)[1]))
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), stored
  )
  context = checkpoint_lib.reading_progress()
  context.pytree.loading.partial_load = True
  progress = checkpoint_lib.PROGRESS
  try:
    with context:
      loaded = ocp.load_checkpointables(
        str(checkpoint.resolve()),
        {"state": {"params": params}, progress: None},
      )
  # Orbax and its storage surface a broken file as many exception types.
  except Exception as error:
    raise UserError(
      f"{checkpoint} cannot be read ({first_line(error)})"
    ) from None
  restored = loaded["state"]["params"]
  _check(restored, loaded[progress]["check_sums"], checkpoint)
  if parts is not None:
    return parts.read(restored)
  # Weights that were trained in 8 bits are exported at full precision.
  return galore_optax.dequantize_params(restored, model.param_dtype)


def _check(params: Any, sums: list[int], checkpoint: pathlib.Path) -> None:
  """Raises unless restored parameters have the checksums they were saved with.

  Those of a state are in the sequence of its leaves: counters come first.
  """
  host = np.array(jax.local_devices(backend="cpu")[:1])
  found = checksums.check_sums(params, jax.sharding.Mesh(host, ("host",)))
  first = train_step.TrainState._fields.index("params")
  if found != sums[first : first + len(found)]:
    raise UserError(
      f"{checkpoint} is damaged (its arrays differ from those that were saved);"
      " choose another with --step, or continue the run, which takes the one"
      " before it"
    )


def _extra(
  path: pathlib.Path, text: str, config: dict[str, Any]
) -> dict[str, dict]:
  """Files beside the weights: the end token, and the length of a row."""
  length = config["data.length"]
  end, end_id = "", {}
  if text:
    end = _end_token(path, text, config)
    number = tokenizers.Tokenizer.from_str(text).token_to_id(end)
    end_id = {} if number is None else {"eos_token_id": number}
  return {
    checkpoint_folder.CONFIG: {"max_position_embeddings": length, **end_id},
    checkpoint_folder.GENERATION: end_id,
    checkpoint_folder.TOKENIZER_CONFIG: describe_tokenizer(end, length),
  }


def _end_token(path: pathlib.Path, text: str, config: dict[str, Any]) -> str:
  """The token that closed the run's documents; "" if it is not known."""
  if (path / run_dir.TEXT).exists():
    return checkpoint_folder.read_json(path / run_dir.TEXT)["end_token"]
  # Older runs did not record it.
  added = json.loads(text).get("added_tokens", [])
  names = {token["content"] for token in added}
  asked = config.get("data.end_token")
  known = [e for e in ([asked] if asked else tokenizer.ENDS) if e in names]
  return next(iter(known), "")


def describe_tokenizer(end: str, length: int) -> dict[str, Any]:
  """The tokenizer_config.json of a run.

  Args:
    end: the token that closes a document; "": not known.
    length: positions that the model was trained on.
  """
  fields = {"eos_token": end} if end else {}
  return checkpoint_folder.tokenizer_config(
    length, clean_up_tokenization_spaces=False, **fields
  )
