"""The names and shapes of LLaMA's tensors, at Hugging Face and here.

`table` pairs the names of the tensors. `Weights` is a model to be read: where
it comes from (a checkpoint folder, a GGUF file, a run) is hidden behind its
`read`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from train.common.errors import UserError
from train.common.fields import Fields
from train.config.schema import ModelConfig
from train.models import llama
from train.pretrained import mapping
from train.pretrained.mapping import (
  EXPERT,
  LAYER,
  Entry,
  Reader,
  Shape,
  Tensor,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TABLE = (
  Entry(EMBEDDING, "embed/embedding"),
  Entry("model.norm.weight", "norm/scale"),
  Entry(HEAD, "lm_head/kernel", transpose=True),
  *(
    Entry(f"model.layers.{LAYER}.{name}.weight", f"layers/{path}/scale")
    for name, path in (
      ("input_layernorm", "attn_norm"),
      ("post_attention_layernorm", "mlp_norm"),
      ("self_attn.q_norm", "attn/q_norm"),
      ("self_attn.k_norm", "attn/k_norm"),
    )
  ),
  *(
    Entry(f"model.layers.{LAYER}.{name}_proj.{end}", f"layers/{path}", turned)
    for name, module in (
      ("self_attn.q", "attn/q"),
      ("self_attn.k", "attn/k"),
      ("self_attn.v", "attn/v"),
      ("self_attn.o", "attn/o"),
      ("mlp.gate", "mlp/gate"),
      ("mlp.up", "mlp/up"),
      ("mlp.down", "mlp/down"),
    )
    for end, path, turned in (
      ("weight", f"{module}/kernel", True),
      ("bias", f"{module}/bias", False),
    )
  ),
)
EXPERTS = {
  family: (
    Entry(f"{block}.gate.weight", "layers/experts/router", transpose=True),
    *(
      Entry(
        f"{block}.experts.{EXPERT}.{name}.weight",
        f"layers/experts/{module}/kernel",
        transpose=True,
      )
      for name, module in zip(names, ("gate", "up", "down"), strict=True)
    ),
  )
  for family, block, names in (
    (
      "mixtral",
      f"model.layers.{LAYER}.block_sparse_moe",
      ("w1", "w3", "w2"),
    ),
    (
      "qwen3_moe",
      f"model.layers.{LAYER}.mlp",
      ("gate_proj", "up_proj", "down_proj"),
    ),
  )
}
# Tables of rotary angles in older checkpoints; we compute them.
IGNORED = ("rotary_emb.inv_freq",)


@dataclasses.dataclass(frozen=True)
class Weights:
  """A trained LLaMA whose tensors are read one at a time.

  The whole model is thus never in memory twice.
  """

  source: str  # where it comes from, as messages call it
  model: ModelConfig
  shapes: Mapping[str, Shape]  # by Hugging Face's names
  read: Reader  # one tensor, by Hugging Face's name
  tokenizer: str = ""  # the text of tokenizer.json; "": it has none
  # Contents of the JSON files beside it: {"config.json": {...}, ...}.
  extra: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

  @property
  def end_ids(self) -> tuple[int, ...]:
    """Ids of the tokens that end a text."""
    for name in ("generation_config.json", "config.json"):
      fields = Fields(f"{self.source}: {name}", self.extra.get(name, {}))
      ids = fields.integers("eos_token_id", None)
      if ids is not None:
        return ids
    return ()


@functools.cache
def _param_shapes(model: ModelConfig) -> dict[str, Shape]:
  return mapping.param_shapes(llama.abstract(model)[1])


def table(model: ModelConfig) -> tuple[Entry, ...]:
  """The names of the tensors of a model's family, with our paths."""
  return (*TABLE, *EXPERTS.get(model.family, ()))


def tensors(model: ModelConfig) -> dict[str, Tensor]:
  """Every tensor that a checkpoint of this model holds, by name."""
  return mapping.tensors(table(model), _param_shapes(model))


def check_layers(model: ModelConfig, count: int, source: str) -> None:
  """Raises if a config describes more layers or experts than tensors.

  It is asked before names are made for all layers, which a damaged number
  would make for minutes.

  Args:
    model: as its config describes it.
    count: tensors in the file.
    source: where they are, for the message.
  """
  for what, least in (
    ("layers", model.n_layers),
    ("experts in all layers", model.n_layers * model.n_experts),
  ):
    if least > count:
      raise UserError(
        f"{source} describes {least:,} {what}, but there are only {count:,}"
        " tensors"
      )


def check(weights: Weights) -> None:
  """Compares names and shapes of the tensors with what the config implies.

  Raises:
    UserError: tensors are missing, unexpected, or of another shape.
  """
  model = weights.model
  wanted = {name: tensor.shape for name, tensor in tensors(model).items()}
  given = {
    name: shape
    for name, shape in weights.shapes.items()
    if not name.endswith(IGNORED)
  }
  if model.tie_embeddings and HEAD in given:
    _check_tied_head(weights)
    given.pop(HEAD)
  mapping.check_names(
    weights.source,
    wanted.keys() - given.keys(),
    given.keys() - wanted.keys(),
    f"{model.family} model",
    f"{model.n_layers} layers, attention_bias={model.attention_bias},"
    f" tie_word_embeddings={model.tie_embeddings}"
    + (f", {model.n_experts} experts" if model.n_experts else ""),
  )
  mapping.check_shapes(weights.source, given, wanted)


def _check_tied_head(weights: Weights) -> None:
  """Refuses a stored head that is not the embedding it is tied to."""
  head, embedding = weights.read(HEAD), weights.read(EMBEDDING)
  if head.shape != embedding.shape or (head != embedding).any():
    raise UserError(
      f"{weights.source} ties head and embedding by its config.json, but"
      f" {HEAD} differs from {EMBEDDING}; set tie_word_embeddings to false"
      " there"
    )


def to_params(weights: Weights) -> dict:
  """Reads a model as our parameters.

  Returns:
    Nested dicts of arrays on the host, in `weights.model.param_dtype`.

  Raises:
    UserError: names or shapes are wrong; nothing is read then. Or a number
      is not finite.
  """
  check(weights)
  model = weights.model
  arrays = mapping.allocate(_param_shapes(model), model.param_dtype)
  mapping.read_into(arrays, tensors(model), weights.read, weights.source)
  return mapping.nested(arrays)


def from_params(
  source: str, model: ModelConfig, params: Callable[[], dict], **more: Any
) -> Weights:
  """Our parameters as `Weights`, under Hugging Face's names.

  Args:
    source: as messages call them.
    model: their config.
    params: returns nested dicts of arrays; called when a tensor is read.
    **more: `tokenizer` and `extra` of `Weights`.
  """
  ours = tensors(model)

  def read(name: str) -> np.ndarray:
    return mapping.to_tensor(params(), ours[name])

  shapes = {name: tensor.shape for name, tensor in ours.items()}
  return Weights(source, model, shapes, read, **more)
