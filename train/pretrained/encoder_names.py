"""Encoder weights under Hugging Face's names, and under ours.

`table` is the one place that pairs the names. Nothing is read before the
config, the names and the shapes were found right.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from train.common.errors import UserError
from train.models import encoder
from train.models.encoder_config import Config, Head
from train.pretrained.llama_names import DTYPES, LAYER, Name

Reader = Callable[[str], np.ndarray]
FAMILIES = ("bert", "roberta")
_BLOCK = f"encoder.layer.{LAYER}."
# Ours, theirs: each a kernel and a bias there.
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
# RoBERTa's head has a dense layer of its own where BERT's takes the pooler.
_HEADS = {
  ("bert", "classify"): (("pooler", "pooler.dense"), ("head", "classifier")),
  ("roberta", "classify"): (
    ("pooler", "classifier.dense"),
    ("head", "classifier.out_proj"),
  ),
  ("bert", "spans"): (("head", "qa_outputs"),),
  ("roberta", "spans"): (("head", "qa_outputs"),),
}
# Parts of a checkpoint that stand beside the encoder, not in it.
_OUTSIDE = ("classifier.", "qa_outputs.")
# Older checkpoints' names of a norm's scale and bias.
_RENAMED = (
  ("LayerNorm.gamma", "LayerNorm.weight"),
  ("LayerNorm.beta", "LayerNorm.bias"),
)
# Field of config.json for what `transformers` has no name for.
POOL = "galore_optax_pool"
_UNREAD = "embeddings.position_ids"  # 0, 1, 2, ...: older checkpoints have it


def table(config: Config) -> tuple[Name, ...]:
  """A row for each of our parameters; names without the model's prefix."""
  heads = _HEADS.get((config.family, config.head), ())
  return (
    *(Name(f"{a}.weight", f"{b}/embedding", False) for b, a in _TABLES),
    *(
      Name(f"{theirs}.{end}", f"{ours}/{name}", False)
      for ours, theirs in _NORMS
      for end, name in (("weight", "scale"), ("bias", "bias"))
    ),
    *(
      Name(f"{theirs}.{end}", f"{ours}/{name}", name == "kernel")
      for ours, theirs in (*_LINEAR, *heads)
      for end, name in (("weight", "kernel"), ("bias", "bias"))
    ),
  )


class Slot(NamedTuple):
  """Where one tensor of theirs goes here."""

  ours: str  # path of a parameter
  layer: int | None  # of the stack; None: it is no stack
  shape: tuple[int, ...]  # theirs
  turned: bool

  @property
  def module(self) -> str:
    """The part of the model that the parameter belongs to."""
    return self.ours.split("/")[0]


def slots(config: Config) -> dict[str, Slot]:
  """The slot of each tensor that the model takes, by their name."""
  shapes, found = _shapes(config), {}
  for row in table(config):
    stacked = LAYER in row.theirs
    shape = shapes[row.ours][1 if stacked else 0 :]
    shape = shape[::-1] if row.turned else shape
    for i in range(config.n_layers) if stacked else (None,):
      name = row.theirs.replace(LAYER, str(i))
      found[name] = Slot(row.ours, i, shape, row.turned)
  return found


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
  """Shapes of our parameters, by path."""
  boxes = nnx.to_pure_dict(encoder.abstract(config)[1])
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxes)
  }


def plain_name(name: str) -> str:
  """A tensor's name without the model's prefix, as newer checkpoints spell."""
  for family in FAMILIES:
    name = name.removeprefix(f"{family}.")
  for old, new in _RENAMED:
    name = name.replace(old, new)
  return name


def full_name(name: str, config: Config) -> str:
  """A tensor's name as `transformers` writes it."""
  bare = config.head == "none" or name.startswith(_OUTSIDE)
  return name if bare else f"{config.family}.{name}"


def to_params(
  source: str,
  config: Config,
  shapes: Mapping[str, tuple[int, ...]],
  read: Reader,
  seed: int = 0,
  refused: Mapping[str, str] = types.MappingProxyType({}),
) -> tuple[dict, tuple[str, ...]]:
  """Our parameters, on the host, in `config.param_dtype`.

  Args:
    source: the checkpoint, as messages call it.
    config: of the model.
    shapes: of the checkpoint's tensors, by name.
    read: gives one tensor.
    seed: of the head, where the checkpoint has none that fits.
    refused: parts of the head that are not taken: what the checkpoint has
      instead.

  Returns:
    The parameters, and sentences: what was initialised, what was left out.

  Raises:
    UserError: the encoder's tensors are missing, unknown, or of another
      shape; nothing is read or allocated then.
  """
  wanted = slots(config)
  given = {plain_name(name): name for name in shapes}
  _check_encoder(source, config, wanted, given, shapes)
  fresh = _fresh_modules(wanted, given, shapes)
  for module, reason in refused.items():
    if module not in fresh:
      fresh[module] = [reason]
  left = [given[name] for name in given if name not in wanted]
  dtype, random = DTYPES[config.param_dtype], np.random.default_rng(seed)
  arrays = {
    path: np.zeros(shape, dtype) for path, shape in _shapes(config).items()
  }
  for name, slot in wanted.items():
    array = arrays[slot.ours]
    if slot.module not in fresh:
      tensor = read(given[name])
      place = array if slot.layer is None else array[slot.layer]
      place[...] = tensor.T if slot.turned else tensor
    elif slot.turned:  # biases start at zero
      array[...] = random.normal(0, config.init_std, array.shape)
  return _nested(arrays), (*_notes_on_fresh(fresh), *_note_on_left(left))


def _check_encoder(
  source: str,
  config: Config,
  wanted: Mapping[str, Slot],
  given: Mapping[str, str],
  shapes: Mapping[str, tuple[int, ...]],
) -> None:
  """Refuses a checkpoint whose encoder is not the one of its config."""
  ours = {n for n, slot in wanted.items() if slot.module in ("embed", "layers")}
  inside = {
    name
    for name in given
    if name.startswith(("embeddings.", "encoder.")) and name != _UNREAD
  }
  for problem, names in (
    ("lacks", sorted(ours - given.keys())),
    (f"has, though {config.family} does not,", sorted(inside - ours)),
  ):
    if names:
      raise UserError(
        f"{source} {problem} {some(names)}; its config.json says"
        f" {config.n_layers} layers of {config.family}"
      )
  wrong = [
    f"{given[name]} is {shapes[given[name]]}, not {wanted[name].shape}"
    for name in sorted(ours)
    if tuple(shapes[given[name]]) != wanted[name].shape
  ]
  if wrong:
    raise UserError(
      f"{source}: {some(wrong)}; tensors and config.json do not belong together"
    )


def _fresh_modules(
  wanted: Mapping[str, Slot],
  given: Mapping[str, str],
  shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, list[str]]:
  """Parts of the head that the checkpoint has not, or not so; the reasons."""
  fresh: dict[str, list[str]] = {}
  for name, slot in wanted.items():
    if slot.module in ("embed", "layers"):
      continue
    if name not in given:
      fresh.setdefault(slot.module, []).append(f"no {name}")
    elif tuple(shapes[given[name]]) != slot.shape:
      fresh.setdefault(slot.module, []).append(
        f"{given[name]} of shape {shapes[given[name]]}, not {slot.shape}"
      )
  return fresh


def _notes_on_fresh(fresh: Mapping[str, list[str]]) -> list[str]:
  return [
    f"{module} starts afresh: the checkpoint has {' and '.join(reasons)}"
    for module, reasons in fresh.items()
  ]


def _note_on_left(left: list[str]) -> list[str]:
  return [f"left out of the checkpoint: {', '.join(left)}"] if left else []


def some(names: list[str]) -> str:
  """The first few of many names."""
  more = f" and {len(names) - 3} more" if len(names) > 3 else ""
  return ", ".join(names[:3]) + more


def _nested(arrays: Mapping[str, np.ndarray]) -> dict:
  params: dict[str, Any] = {}
  for path, array in arrays.items():
    part = params
    *parents, name = path.split("/")
    for parent in parents:
      part = part.setdefault(parent, {})
    part[name] = array
  return params


def to_tensors(config: Config, params: dict) -> dict[str, np.ndarray]:
  """Our parameters under Hugging Face's names."""
  tensors = {}
  for name, slot in slots(config).items():
    found: Any = params
    for part in slot.ours.split("/"):
      found = found[part]
    array = np.asarray(found)
    array = array if slot.layer is None else array[slot.layer]
    tensors[full_name(name, config)] = np.ascontiguousarray(
      array.T if slot.turned else array
    )
  return tensors


def config_from_hf(
  given: Mapping[str, Any], source: str, head: Head, labels: int, **changes: Any
) -> Config:
  """The encoder that a config.json of Hugging Face's describes.

  Args:
    given: the config.json.
    source: its path, as messages call it.
    head: what stands on the encoder.
    labels: outputs of a classification head.
    **changes: other fields of `Config`: how the model is computed.

  Raises:
    UserError: another architecture, a field missing, or a variant that
      `train/models/encoder.py` does not compute.
  """
  family = given.get("model_type")
  if family not in FAMILIES:
    raise UserError(
      f"{source}: model_type is {family!r}; only"
      f" {' and '.join(map(repr, FAMILIES))} can be read"
    )
  names = ("vocab_size", "hidden_size", "intermediate_size")
  names += ("num_hidden_layers", "num_attention_heads")
  missing = [name for name in names if given.get(name) is None]
  if missing:
    raise UserError(f"{source} has no {', '.join(missing)}")
  _refuse_variants(given, source)
  pad = given.get("pad_token_id")
  pad = (1 if family == "roberta" else 0) if pad is None else pad
  offset = pad + 1 if family == "roberta" else 0
  dropout = given.get("hidden_dropout_prob", 0.1)
  head_dropout = given.get("classifier_dropout")
  read: dict[str, Any] = {
    "vocab_size": given["vocab_size"],
    "d_model": given["hidden_size"],
    "d_ff": given["intermediate_size"],
    "n_layers": given["num_hidden_layers"],
    "n_heads": given["num_attention_heads"],
    "family": family,
    "max_length": given.get("max_position_embeddings", 512) - offset,
    "position_offset": offset,
    "n_types": given.get("type_vocab_size", 2),
    "pad_id": pad,
    "norm_eps": given.get("layer_norm_eps", 1e-12),
    "activation": given.get("hidden_act", "gelu"),
    "init_std": given.get("initializer_range", 0.02),
    "pool": given.get(POOL, "first"),
    "dropout": dropout,
    "attention_dropout": given.get("attention_probs_dropout_prob", 0.1),
    "head_dropout": dropout if head_dropout is None else head_dropout,
  }
  return Config(**read | {"head": head, "labels": labels} | changes)


def _refuse_variants(given: Mapping[str, Any], source: str) -> None:
  width = given["hidden_size"]
  known = {
    "hidden_act": ("gelu", tuple(encoder.ACTIVATIONS)),
    "position_embedding_type": ("absolute", ("absolute",)),
    "is_decoder": (False, (False,)),
    "add_cross_attention": (False, (False,)),
    "embedding_size": (width, (width,)),
  }
  for name, (default, computed) in known.items():
    value = given.get(name, default)
    if value not in computed:
      raise UserError(
        f"{source}: {name} is {value!r}; this model computes"
        f" {' or '.join(map(repr, computed))} only"
      )


_CLASSES = {
  "none": "Model",
  "classify": "ForSequenceClassification",
  "spans": "ForQuestionAnswering",
}


def config_to_hf(config: Config, extra: Mapping[str, Any]) -> dict[str, Any]:
  """The config.json that `transformers` reads.

  Args:
    config: the model's.
    extra: what is not the shape's: ids of tokens, names of labels.
  """
  prefix = {"bert": "Bert", "roberta": "Roberta"}[config.family]
  labels = {str(i): f"LABEL_{i}" for i in range(config.labels)}
  named = {"id2label": labels} if config.head == "classify" else {}
  return {
    **named,
    **extra,
    "architectures": [prefix + _CLASSES[config.head]],
    "model_type": config.family,
    "vocab_size": config.vocab_size,
    "hidden_size": config.d_model,
    "intermediate_size": config.d_ff,
    "num_hidden_layers": config.n_layers,
    "num_attention_heads": config.n_heads,
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
