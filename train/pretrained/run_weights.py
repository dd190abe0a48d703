"""Reads the weights of a pre-training run from its checkpoints."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import tokenizers
from flax import nnx
from orbax.checkpoint import v1 as ocp

import galore_optax
from train.common import inputs, links
from train.common.errors import UserError
from train.common.fields import Fields
from train.config import schema
from train.data import tokenizer
from train.models import llama
from train.pretrained import checkpoint_folder, llama_names
from train.pretrained.llama_names import Weights
from train.run import checkpoint as checkpoint_lib
from train.run import checksums, run_dir
from train.step import adapters
from train.step import state as state_lib


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
  fields = Fields(str(links.inside(path, run_dir.CONFIG)), config)
  model = schema.read_group(schema.ModelConfig, "model", fields)
  method = schema.read_group(schema.OptimizerConfig, "optimizer", fields)
  parts = adapters.make(method)
  checkpoints = path / run_dir.FOLDER
  checkpoint = checkpoints / str(step or _newest(checkpoints))
  text = checkpoint_folder.read_text(
    links.inside(path, checkpoint_folder.TOKENIZER)
  )
  return llama_names.from_params(
    str(path),
    model,
    functools.cache(lambda: _restore(checkpoint, model, parts)),
    tokenizer=text,
    extra=_extra(path, text, fields),
  )


def _newest(checkpoints: pathlib.Path) -> int:
  """The step of the last complete checkpoint."""
  steps = checkpoint_lib.steps_in(checkpoints.parent)
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
  store = parts.init if parts else functools.partial(state_lib.store, model)
  stored = jax.eval_shape(store, nnx.to_pure_dict(llama.abstract(model)[1]))
  abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host)
  params = jax.tree.map(abstract, stored)
  step = abstract(np.zeros((), np.int32))
  context = checkpoint_lib.reading_progress()
  context.pytree.loading.partial_load = True
  progress = checkpoint_lib.PROGRESS
  links.check_tree(checkpoint)
  # Orbax and its storage surface a broken file as many exception types.
  with inputs.refusing(f"{checkpoint} cannot be read"), context:
    loaded = ocp.load_checkpointables(
      str(checkpoint.resolve()),
      {"state": {"params": params, "step": step}, progress: None},
    )
  restored = loaded["state"]["params"]
  try:
    saved = checkpoint_lib.Progress.check(loaded[progress])
    checkpoint_lib.check_step(int(loaded["state"]["step"]), checkpoint)
  except checkpoint_lib.Damaged as error:
    raise UserError(f"{checkpoint} is damaged: {error}") from None
  _check(restored, saved["check_sums"], checkpoint)
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
  first = state_lib.TrainState._fields.index("params")
  if found != sums[first : first + len(found)]:
    raise UserError(
      f"{checkpoint} is damaged (its arrays differ from those that were saved);"
      " choose another with --step, or continue the run, which takes the one"
      " before it"
    )


def _extra(path: pathlib.Path, text: str, config: Fields) -> dict[str, dict]:
  """Files beside the weights: the end token, and the length of a row."""
  length = config.integer("data.length", low=1)
  end, end_id = "", {}
  if text:
    file = path / checkpoint_folder.TOKENIZER
    parsed = tokenizer.parse(text, str(file))
    end = _end_token(path, parsed, config)
    number = parsed.token_to_id(end)
    if end and number is None:
      raise UserError(f"{file} does not have {end!r}, the run's end token")
    end_id = {} if number is None else {"eos_token_id": number}
  # Tokens that the run does not know; else each family has its own default.
  none = {"bos_token_id": None, "pad_token_id": None}
  described = {"max_position_embeddings": length, **none, **end_id}
  return {
    checkpoint_folder.CONFIG: described,
    checkpoint_folder.GENERATION: end_id,
    checkpoint_folder.TOKENIZER_CONFIG: describe_tokenizer(end, length),
  }


def _end_token(
  path: pathlib.Path, parsed: tokenizers.Tokenizer, config: Fields
) -> str:
  """The token that closed the run's documents; "" if it is not known."""
  if (path / run_dir.TEXT).exists():
    file = links.inside(path, run_dir.TEXT)
    return inputs.read_fields(file).text("end_token")
  # Older runs did not record it.
  added = parsed.get_added_tokens_decoder().values()
  names = {token.content for token in added}
  asked = config.text("data.end_token", "")
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
