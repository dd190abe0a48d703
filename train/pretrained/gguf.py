"""Reads the weights in a GGUF file; needs the extra `gguf`.

Tensors are dequantized, their names are translated by the table of the `gguf`
package, the rows of LLaMA's queries and keys are put back into Hugging Face's
order, the stacked kernels of experts are divided, and the tokenizer becomes a
tokenizer.json.
"""

import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from train.common import inputs
from train.common.errors import UserError
from train.common.fields import Fields
from train.config.schema import ModelConfig
from train.pretrained import (
  gguf_config,
  gguf_header,
  gguf_tokenizer,
  llama_config,
  llama_names,
)
from train.pretrained.llama_names import Weights

# Architectures that are called otherwise than our families.
ARCHITECTURES = {"mixtral": "LLAMA", "qwen3_moe": "QWEN3MOE"}
PERMUTED = ("llama", "mixtral")
EXPERT = re.compile(r"\.experts\.(\d+)\.")


class Stored(NamedTuple):
  """A tensor of the file, or one expert's part of it."""

  tensor: Any
  expert: int | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    """Its shape; GGUF lists the innermost axis first."""
    shape = tuple(self.tensor.shape.tolist())[::-1]
    return shape if self.expert is None else shape[1:]

  @property
  def data(self) -> np.ndarray:
    """Its numbers, which may be quantized."""
    data = self.tensor.data
    return data if self.expert is None else data[self.expert]


def load(path: pathlib.Path) -> Weights:
  """Opens a GGUF file; tensors are dequantized when they are read.

  Raises:
    UserError: the package is missing, the file is damaged, or it holds
      another architecture.
  """
  try:
    import gguf
  except ImportError:
    raise UserError(
      f"{path}: GGUF files need the package gguf; pip install gguf"
    ) from None
  gguf_header.check(path)
  with inputs.refusing(f"{path} cannot be read as GGUF"):
    reader = gguf.GGUFReader(path)
    contents = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
  fields = Fields(str(path), contents)
  scales = tensors.pop(gguf_config.ROPE_SCALES, None)
  factors = None if scales is None else _dequantize(gguf, Stored(scales), path)
  config = gguf_config.to_hf(fields, tensors.keys(), factors)
  model = llama_config.from_hf(config, str(path))
  parts = len(tensors) * max(1, model.n_experts)
  llama_names.check_layers(model, parts, str(path))
  by_name = _by_name(gguf, tensors, model)

  def read(name: str) -> np.ndarray:
    array = _dequantize(gguf, by_name[name], path)
    for part, heads in (("q", model.n_heads), ("k", model.kv_heads)):
      if f"self_attn.{part}_proj." in name and model.family in PERMUTED:
        return _unpermute(array, heads)
    return array

  return Weights(
    source=str(path),
    model=model,
    shapes={name: x.shape for name, x in by_name.items()},
    read=read,
    tokenizer=gguf_tokenizer.to_json(fields),
    extra=_extra(fields, config),
  )


def _by_name(
  gguf: Any, tensors: dict[str, Any], model: ModelConfig
) -> dict[str, Stored]:
  """The tensors by Hugging Face's names, of which each expert has its own.

  A tensor that the model does not have keeps its name, for the error message.
  So does a stack of another number of experts.
  """
  found, read = {}, set()
  for name in llama_names.tensors(model):
    expert = EXPERT.search(name)
    stored = _gguf_name(gguf, EXPERT.sub(".experts.", name), model)
    if stored not in tensors:
      continue
    tensor = tensors[stored]
    if expert and tensor.shape[-1] != model.n_experts:
      continue
    found[name] = Stored(tensor, int(expert[1]) if expert else None)
    read.add(stored)
  rest = {name: Stored(x) for name, x in tensors.items() if name not in read}
  return found | rest


def _dequantize(gguf: Any, stored: Stored, path: pathlib.Path) -> np.ndarray:
  """A tensor as floating-point numbers; integers are no weights."""
  tensor = stored.tensor
  kind = tensor.tensor_type
  if kind.name.startswith(("I8", "I16", "I32", "I64")):
    raise UserError(
      f"{path}: the tensor {tensor.name!r} has type {kind.name}; weights are"
      " floating-point numbers, or quantized"
    )
  if kind.name == "F64":
    return stored.data
  with inputs.refusing(f"{path}: the tensor {tensor.name!r} cannot be read"):
    return gguf.quants.dequantize(stored.data, kind)


def _gguf_name(gguf: Any, name: str, model: ModelConfig) -> str:
  """The name in a GGUF file of a tensor that Hugging Face calls `name`."""
  name_there = ARCHITECTURES.get(model.family, model.family.upper())
  kind = gguf.MODEL_ARCH[name_there]
  table = gguf.get_tensor_name_map(kind, model.n_layers)
  return table.get_name(name, try_suffixes=(".weight", ".bias"))


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
  """Puts the rows of queries or keys back into Hugging Face's order.

  The rotary embedding of GGUF's LLaMA rotates features 2i and 2i + 1 of a head
  together; ours rotates features i and i + H/2. Biases have rows of one number.
  """
  halves = rows.reshape(heads, -1, 2, *rows.shape[1:])
  return halves.swapaxes(1, 2).reshape(rows.shape)


def _extra(fields: Fields, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
  """Begin and end tokens and the maximum length, for the JSON files."""
  prefix = "tokenizer.ggml."
  tokens = fields.texts(f"{prefix}tokens")
  ids = {
    f"{name}_token_id": fields.integer(
      f"{prefix}{name}_token_id", high=len(tokens) - 1
    )
    for name in ("bos", "eos")
    if fields.has(f"{prefix}{name}_token_id")
  }
  length = config.get("max_position_embeddings")
  described = {"tokenizer_class": "PreTrainedTokenizerFast"}
  described |= {name[:-3]: tokens[i] for name, i in ids.items()}
  template = fields.text("tokenizer.chat_template", "")
  described |= {"chat_template": template} if template else {}
  limit = {} if length is None else {"max_position_embeddings": length}
  return {
    "config.json": limit | ids,
    "generation_config.json": ids,
    "tokenizer_config.json": described,
  }
