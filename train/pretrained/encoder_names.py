"""Names, shapes and configs of BERT and RoBERTa, at Hugging Face and here.

`table` pairs the names of the tensors. The encoder itself must be in a
checkpoint, exactly; a head that is missing or does not fit is initialized.
"""

import functools
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from train.common.errors import UserError
from train.common.fields import Fields
from train.models import encoder
from train.models.encoder_config import Config, Head
from train.pretrained import mapping
from train.pretrained.mapping import LAYER, Entry, Reader, Shape, Tensor

FAMILIES = ("bert", "roberta")
_BLOCK = f"encoder.layer.{LAYER}."
# Our path, the name there: a kernel and a bias each.
_LINEAR = (
  ("layers/attn/q", f"{_BLOCK}attention.self.query"),
  ("layers/attn/k", f"{_BLOCK}attention.self.key"),
  ("layers/attn/v", f"{_BLOCK}attention.self.value"),
  ("layers/attn/o", f"{_BLOCK}attention.output.dense"),
  ("layers/mlp/up", f"{_BLOCK}intermediate.dense"),
  ("layers/mlp/down", f"{_BLOCK}output.dense"),
)
_NORMS = (
  ("embed/norm", "embeddings.LayerNorm"),
  ("layers/attn_norm", f"{_BLOCK}attention.output.LayerNorm"),
  ("layers/mlp_norm", f"{_BLOCK}output.LayerNorm"),
)
_TABLES = (
  ("embed/words", "embeddings.word_embeddings"),
  ("embed/positions", "embeddings.position_embeddings"),
  ("embed/types", "embeddings.token_type_embeddings"),
)
# The dense layer of the head: RoBERTa's own, and BERT's pooler.
_HEADS = {
  ("bert", "classify"): (("pooler", "pooler.dense"), ("head", "classifier")),
  ("roberta", "classify"): (
    ("pooler", "classifier.dense"),
    ("head", "classifier.out_proj"),
  ),
  ("bert", "spans"): (("head", "qa_outputs"),),
  ("roberta", "spans"): (("head", "qa_outputs"),),
}
# Heads, whose names have no prefix.
_HEAD_NAMES = ("classifier.", "qa_outputs.")
# Names of a norm's scale and bias in older checkpoints.
_RENAMED = (
  ("LayerNorm.gamma", "LayerNorm.weight"),
  ("LayerNorm.beta", "LayerNorm.bias"),
)
# A field of config.json that `transformers` does not have.
POOL = "galore_optax_pool"
_UNREAD = "embeddings.position_ids"  # 0, 1, 2, ...: older checkpoints have it


def table(config: Config) -> tuple[Entry, ...]:
  """An entry for each parameter; names are without the model's prefix."""
  heads = _HEADS.get((config.family, config.head), ())
  return (
    *(Entry(f"{name}.weight", f"{path}/embedding") for path, name in _TABLES),
    *(
      Entry(f"{name}.{theirs}", f"{path}/{ours}")
      for path, name in _NORMS
      for theirs, ours in (("weight", "scale"), ("bias", "bias"))
    ),
    *(
      Entry(f"{name}.{theirs}", f"{path}/{ours}", transpose=ours == "kernel")
      for path, name in (*_LINEAR, *heads)
      for theirs, ours in (("weight", "kernel"), ("bias", "bias"))
    ),
  )


@functools.cache
def _param_shapes(config: Config) -> dict[str, Shape]:
  return mapping.param_shapes(encoder.abstract(config)[1])


def tensors(config: Config) -> dict[str, Tensor]:
  """Every tensor that the model reads, by its name without the prefix."""
  return mapping.tensors(table(config), _param_shapes(config))


def plain_name(name: str) -> str:
  """A tensor's name without the model's prefix, in the newer spelling."""
  for family in FAMILIES:
    name = name.removeprefix(f"{family}.")
  for old, new in _RENAMED:
    name = name.replace(old, new)
  return name


def full_name(name: str, config: Config) -> str:
  """A tensor's name as `transformers` writes it."""
  bare = config.head == "none" or name.startswith(_HEAD_NAMES)
  return name if bare else f"{config.family}.{name}"


def _is_encoder(tensor: Tensor) -> bool:
  return tensor.module in ("embed", "layers")


def to_params(
  source: str,
  config: Config,
  shapes: Mapping[str, Shape],
  read: Reader,
  seed: int = 0,
  refused: Mapping[str, str] = types.MappingProxyType({}),
) -> tuple[dict, tuple[str, ...]]:
  """Reads a checkpoint as our parameters.

  Args:
    source: the checkpoint, as messages call it.
    config: of the model.
    shapes: of the checkpoint's tensors, by name.
    read: reads one tensor, by name.
    seed: of a head that is initialized.
    refused: modules of the head that are initialized although their shapes
      fit, each with what is wrong with them in the checkpoint.

  Returns:
    Nested dicts of arrays on the host, in `config.param_dtype`; and notes,
    sentences that say what was initialized and what was not read.

  Raises:
    UserError: tensors of the encoder are missing, unexpected, or of another
      shape; nothing is read or allocated then.
  """
  wanted = tensors(config)
  given = {plain_name(name): name for name in shapes}
  _check_encoder(source, config, wanted, given, shapes)
  fresh = _fresh_modules(wanted, given, shapes)
  for module, reason in refused.items():
    fresh.setdefault(module, [reason])
  unread = [given[name] for name in given if name not in wanted]
  arrays = mapping.allocate(_param_shapes(config), config.param_dtype)
  taken = {n: t for n, t in wanted.items() if t.module not in fresh}
  mapping.read_into(arrays, taken, lambda name: read(given[name]), source)
  random = np.random.default_rng(seed)
  for tensor in wanted.values():
    if tensor.module in fresh and tensor.transpose:  # biases start at zero
      array = arrays[tensor.path]
      with np.errstate(over="ignore"):  # found below
        array[...] = random.normal(0, config.init_std, array.shape)
      mapping.check_finite(array, tensor.path, source)
  return mapping.nested(arrays), _notes(fresh, unread)


def _check_encoder(
  source: str,
  config: Config,
  wanted: Mapping[str, Tensor],
  given: Mapping[str, str],
  shapes: Mapping[str, Shape],
) -> None:
  """Refuses a checkpoint whose encoder is not the one of its config."""
  ours = {n for n, tensor in wanted.items() if _is_encoder(tensor)}
  theirs = {
    name
    for name in given
    if name.startswith(("embeddings.", "encoder.")) and name != _UNREAD
  }
  mapping.check_names(
    source,
    ours - given.keys(),
    theirs - ours,
    config.family,
    f"{config.n_layers} layers of {config.family}",
  )
  wanted_shapes = {given[name]: wanted[name].shape for name in sorted(ours)}
  mapping.check_shapes(source, shapes, wanted_shapes)


def _fresh_modules(
  wanted: Mapping[str, Tensor],
  given: Mapping[str, str],
  shapes: Mapping[str, Shape],
) -> dict[str, list[str]]:
  """Modules of the head that must be initialized, each with the reasons."""
  fresh: dict[str, list[str]] = {}
  for name, tensor in wanted.items():
    if _is_encoder(tensor):
      continue
    if name not in given:
      fresh.setdefault(tensor.module, []).append(f"no {name}")
    elif tuple(shapes[given[name]]) != tensor.shape:
      fresh.setdefault(tensor.module, []).append(
        f"{given[name]} of shape {shapes[given[name]]}, not {tensor.shape}"
      )
  return fresh


def _notes(
  fresh: Mapping[str, list[str]], unread: list[str]
) -> tuple[str, ...]:
  """Sentences about modules that were initialized and tensors not read."""
  notes = [
    f"{module} is initialized: the checkpoint has {' and '.join(reasons)}"
    for module, reasons in fresh.items()
  ]
  if unread:
    notes.append(f"not read from the checkpoint: {', '.join(unread)}")
  return tuple(notes)


def to_tensors(config: Config, params: dict) -> dict[str, np.ndarray]:
  """Our parameters under Hugging Face's names."""
  return {
    full_name(name, config): mapping.to_tensor(params, tensor)
    for name, tensor in tensors(config).items()
  }


def config_from_hf(
  given: Mapping[str, Any], source: str, head: Head, labels: int, **changes: Any
) -> Config:
  """The encoder that a config.json of Hugging Face describes.

  Args:
    given: the content of config.json.
    source: its path, as messages call it.
    head: the head on top of the encoder.
    labels: outputs of a classification head.
    **changes: other fields of `Config`: how the model is computed.

  Raises:
    UserError: another architecture, a field missing, or a variant that
      `train/models/encoder.py` does not implement.
  """
  family = given.get("model_type")
  if family not in FAMILIES:
    raise UserError(
      f"{source}: model_type is {family!r}; only"
      f" {' and '.join(map(repr, FAMILIES))} can be read"
    )
  fields = Fields(source, given)
  sizes = mapping.sizes_from_hf(fields)
  _refuse_variants(fields)
  pad = fields.integer("pad_token_id", 1 if family == "roberta" else 0)
  offset = pad + 1 if family == "roberta" else 0
  positions = fields.integer("max_position_embeddings", 512, low=offset + 1)
  dropout = fields.number("hidden_dropout_prob", 0.1)
  read: dict[str, Any] = {
    **sizes,
    "family": family,
    "max_length": positions - offset,
    "position_offset": offset,
    "n_types": fields.integer("type_vocab_size", 2, low=1),
    "pad_id": pad,
    "norm_eps": fields.number("layer_norm_eps", 1e-12),
    "activation": fields.text("hidden_act", "gelu"),
    "init_std": fields.number("initializer_range", 0.02, low=0),
    "pool": fields.choice(POOL, ("first", "mean"), "first"),
    "dropout": dropout,
    "attention_dropout": fields.number("attention_probs_dropout_prob", 0.1),
    "head_dropout": fields.number("classifier_dropout", dropout),
  }
  with mapping.naming(source):
    return Config(**read | {"head": head, "labels": labels} | changes)


def _refuse_variants(fields: Fields) -> None:
  width = fields.integer("hidden_size")
  implemented = {
    "hidden_act": (
      fields.text("hidden_act", "gelu"),
      tuple(encoder.ACTIVATIONS),
    ),
    "position_embedding_type": (
      fields.text("position_embedding_type", "absolute"),
      ("absolute",),
    ),
    "is_decoder": (fields.flag("is_decoder", False), (False,)),
    "add_cross_attention": (
      fields.flag("add_cross_attention", False),
      (False,),
    ),
    "embedding_size": (fields.integer("embedding_size", width), (width,)),
  }
  mapping.refuse_variants(fields.source, implemented)


_CLASSES = {
  "none": "Model",
  "classify": "ForSequenceClassification",
  "spans": "ForQuestionAnswering",
}


def config_to_hf(config: Config, extra: Mapping[str, Any]) -> dict[str, Any]:
  """The config.json that `transformers` reads.

  Args:
    config: of the model.
    extra: other fields: ids of special tokens, names of labels.
  """
  prefix = {"bert": "Bert", "roberta": "Roberta"}[config.family]
  labels = {str(i): f"LABEL_{i}" for i in range(config.labels)}
  named = {"id2label": labels} if config.head == "classify" else {}
  return {
    **named,
    **extra,
    "architectures": [prefix + _CLASSES[config.head]],
    "model_type": config.family,
    **mapping.sizes_to_hf(config),
    "max_position_embeddings": config.max_length + config.position_offset,
    "type_vocab_size": config.n_types,
    "pad_token_id": config.pad_id,
    "layer_norm_eps": config.norm_eps,
    "hidden_act": config.activation,
    "initializer_range": config.init_std,
    "hidden_dropout_prob": config.dropout,
    "attention_probs_dropout_prob": config.attention_dropout,
    "classifier_dropout": config.head_dropout,
    "position_embedding_type": "absolute",
    "torch_dtype": config.param_dtype,
    POOL: config.pool,
  }
