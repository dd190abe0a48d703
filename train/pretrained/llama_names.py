"""LLaMA's names, shapes and config, at Hugging Face and here.

`TABLE` pairs the names of the tensors. `Weights` is a model to be read: where
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
from train.pretrained.mapping import LAYER, Entry, Reader, Shape, Tensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TABLE = (
  Entry(EMBEDDING, "embed/embedding"),
  Entry("model.norm.weight", "norm/scale"),
  Entry(HEAD, "lm_head/kernel", transpose=True),
  *(
    Entry(f"model.layers.{LAYER}.{name}.weight", f"layers/{path}", transpose)
    for name, path, transpose in (
      ("input_layernorm", "attn_norm/scale", False),
      ("post_attention_layernorm", "mlp_norm/scale", False),
      ("self_attn.q_proj", "attn/q/kernel", True),
      ("self_attn.k_proj", "attn/k/kernel", True),
      ("self_attn.v_proj", "attn/v/kernel", True),
      ("self_attn.o_proj", "attn/o/kernel", True),
      ("mlp.gate_proj", "mlp/gate/kernel", True),
      ("mlp.up_proj", "mlp/up/kernel", True),
      ("mlp.down_proj", "mlp/down/kernel", True),
    )
  ),
)
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


def tensors(model: ModelConfig) -> dict[str, Tensor]:
  """Every tensor that a checkpoint of this model holds, by name."""
  return mapping.tensors(TABLE, _param_shapes(model))


def check_layers(model: ModelConfig, count: int, source: str) -> None:
  """Raises if a config describes more layers than there are tensors.

  It is asked before names are made for all layers, which a damaged number
  would make for minutes.

  Args:
    model: as its config describes it.
    count: tensors in the file.
    source: where they are, for the message.
  """
  if model.n_layers > count:
    raise UserError(
      f"{source} describes {model.n_layers:,} layers, but there are only"
      f" {count:,} tensors"
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
    "LLaMA",
    f"{model.n_layers} layers, tie_word_embeddings={model.tie_embeddings}",
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


def model_from_hf(given: Mapping[str, Any], source: str) -> ModelConfig:
  """The model that a config.json of Hugging Face describes.

  Args:
    given: the content of config.json.
    source: its path, as messages call it.

  Raises:
    UserError: another architecture, a field missing, or a variant of LLaMA
      that `train/models/llama.py` does not implement.
  """
  kind = given.get("model_type")
  if kind != "llama":
    raise UserError(
      f"{source}: model_type is {kind!r}; only 'llama' can be read"
    )
  fields = Fields(source, given)
  sizes: dict[str, Any] = mapping.sizes_from_hf(fields)
  _refuse_variants(fields)
  heads = sizes["n_heads"]
  kv_heads = fields.integer("num_key_value_heads", 0) or heads
  newer = fields.group("rope_parameters").number("rope_theta", 0.0)
  older = fields.number("rope_theta", 0.0)
  with mapping.naming(source):
    return ModelConfig(
      **sizes,
      n_kv_heads=0 if kv_heads == heads else kv_heads,
      rope_theta=newer or older or 10000.0,
      norm_eps=fields.number("rms_norm_eps", 1e-6),
      init_std=fields.number("initializer_range", 0.02),
      tie_embeddings=fields.flag("tie_word_embeddings", False),
    )


def _refuse_variants(fields: Fields) -> None:
  width = fields.integer("hidden_size") // fields.integer("num_attention_heads")
  # The second is the spelling of transformers 5, which always writes it.
  ropes = [fields.group(name) for name in ("rope_scaling", "rope_parameters")]
  kinds = [
    rope.text("rope_type", "") or rope.text("type", "") for rope in ropes
  ]
  scaled = [kind for kind in kinds if kind not in ("", "default")]
  mapping.refuse_variants(
    fields.source,
    {
      "hidden_act": (fields.text("hidden_act", "silu"), ("silu",)),
      "attention_bias": (fields.flag("attention_bias", False), (False,)),
      "mlp_bias": (fields.flag("mlp_bias", False), (False,)),
      "head_dim": (fields.integer("head_dim", 0) or width, (width,)),
      "rope_type": (next(iter(scaled), "default"), ("default",)),
    },
  )


def model_to_hf(
  model: ModelConfig, dtype: str, extra: Mapping[str, Any]
) -> dict[str, Any]:
  """The config.json that `transformers` reads.

  Args:
    model: the model.
    dtype: of the stored tensors.
    extra: other fields: ids of special tokens, `max_position_embeddings`.
  """
  return {
    **extra,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **mapping.sizes_to_hf(model),
    "num_key_value_heads": model.kv_heads,
    "head_dim": model.head_width,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": model.norm_eps,
    "initializer_range": model.init_std,
    "tie_word_embeddings": model.tie_embeddings,
    # The spelling of transformers before version 5, and that of version 5.
    "rope_theta": model.rope_theta,
    "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
    "torch_dtype": dtype,
  }
