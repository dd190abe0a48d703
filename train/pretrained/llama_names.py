"""LLaMA weights under Hugging Face's names, and under ours.

`TABLE` is the one place that pairs the names. What a source of weights is (a
folder of safetensors, a GGUF file, a run) is said by `Weights`; nothing is
read before its config, its names and its shapes were found right.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from train.common.errors import UserError
from train.config.schema import ModelConfig
from train.models import llama

DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
LAYER = "{layer}"


class Name(NamedTuple):
  """A tensor there and the parameter it is here."""

  theirs: str  # LAYER in it: one tensor a layer, which we keep as one stack
  ours: str
  turned: bool  # theirs is (out, in), ours (in, out)


TABLE = (
  Name("model.embed_tokens.weight", "embed/embedding", False),
  Name("model.norm.weight", "norm/scale", False),
  Name("lm_head.weight", "lm_head/kernel", True),
  *(
    Name(f"model.layers.{LAYER}.{theirs}.weight", f"layers/{ours}", turned)
    for theirs, ours, turned in (
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
# Tables of angles that older exports carry; we compute them.
IGNORED = ("rotary_emb.inv_freq",)


@dataclasses.dataclass(frozen=True)
class Weights:
  """A model that somebody else, or a run of ours, has trained.

  `read` gives one tensor by Hugging Face's name, so that a model is never in
  memory twice.
  """

  source: str  # as messages call it
  model: ModelConfig
  shapes: Mapping[str, tuple[int, ...]]  # by Hugging Face's name
  read: Callable[[str], np.ndarray]
  tokenizer: str = ""  # the text of tokenizer.json; "": it has none
  # Beside the shape: {"config.json": {...}, "generation_config.json": ...}
  extra: Mapping[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

  @property
  def end_ids(self) -> tuple[int, ...]:
    """Tokens that end a text."""
    for name in ("generation_config.json", "config.json"):
      found = self.extra.get(name, {}).get("eos_token_id")
      if found is not None:
        return tuple(found) if isinstance(found, list) else (found,)
    return ()


def expected(model: ModelConfig) -> dict[str, tuple[Name, Any]]:
  """Row of the table and our abstract leaf, by our path."""
  boxes = nnx.to_pure_dict(llama.abstract(model)[1])
  leaves = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxes)
  }
  rows = {row.ours: row for row in TABLE}
  return {path: (rows[path], leaf) for path, leaf in leaves.items()}


def their_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Every tensor that a checkpoint of this shape holds."""
  shapes: dict[str, tuple[int, ...]] = {}
  for row, leaf in expected(model).values():
    stacked = LAYER in row.theirs
    shape = leaf.shape[1:] if stacked else leaf.shape
    shape = shape[::-1] if row.turned else shape
    for layer in range(model.n_layers if stacked else 1):
      shapes[row.theirs.replace(LAYER, str(layer))] = shape
  return shapes


def check(weights: Weights) -> None:
  """Compares names and shapes with what the config says.

  Raises:
    UserError: tensors are missing, unknown, or of another shape.
  """
  wanted = their_shapes(weights.model)
  given = {
    name: tuple(shape)
    for name, shape in weights.shapes.items()
    if not name.endswith(IGNORED)
  }
  if weights.model.tie_embeddings and "lm_head.weight" in given:
    _check_copy(weights)
    given.pop("lm_head.weight")
  for problem, names in (
    ("lacks", sorted(wanted.keys() - given.keys())),
    ("has, though a LLaMA does not,", sorted(given.keys() - wanted.keys())),
  ):
    if names:
      raise UserError(
        f"{weights.source} {problem} {_some(names)}; its config.json says"
        f" {weights.model.n_layers} layers,"
        f" tie_word_embeddings={weights.model.tie_embeddings}"
      )
  wrong = [
    f"{name} is {given[name]}, not {shape}"
    for name, shape in wanted.items()
    if given[name] != shape
  ]
  if wrong:
    raise UserError(
      f"{weights.source}: {_some(wrong)}; tensors and config.json do not"
      " belong together"
    )


def _check_copy(weights: Weights) -> None:
  """A tied head that is stored all the same must be the embedding."""
  head, table = (
    weights.read(name)
    for name in ("lm_head.weight", "model.embed_tokens.weight")
  )
  if head.shape != table.shape or (head != table).any():
    raise UserError(
      f"{weights.source} ties head and embedding by its config.json, but"
      " lm_head.weight differs from model.embed_tokens.weight; set"
      " tie_word_embeddings to false there"
    )


def _some(names: list[str]) -> str:
  more = f" and {len(names) - 3} more" if len(names) > 3 else ""
  return ", ".join(names[:3]) + more


def to_params(weights: Weights) -> dict:
  """Our parameters, on the host, in `weights.model.param_dtype`.

  Raises:
    UserError: names or shapes are wrong; nothing is read then.
  """
  check(weights)
  dtype, params = DTYPES[weights.model.param_dtype], {}
  for path, (row, leaf) in expected(weights.model).items():
    array = np.empty(leaf.shape, dtype)
    stacked = LAYER in row.theirs
    for layer, slot in enumerate(array if stacked else [array]):
      tensor = weights.read(row.theirs.replace(LAYER, str(layer)))
      slot[...] = tensor.T if row.turned else tensor
    part = params
    *parents, name = path.split("/")
    for parent in parents:
      part = part.setdefault(parent, {})
    part[name] = array
  return params


def from_params(
  source: str, model: ModelConfig, params: Callable[[], dict], **more: Any
) -> Weights:
  """Our parameters under Hugging Face's names.

  Args:
    source: as messages call them.
    model: their config.
    params: gives them, nested dicts of arrays; asked when one is read.
    **more: `tokenizer` and `extra`.
  """
  places: dict[str, tuple[Name, int]] = {}
  for row, _ in expected(model).values():
    for layer in range(model.n_layers if LAYER in row.theirs else 1):
      places[row.theirs.replace(LAYER, str(layer))] = row, layer

  def read(name: str) -> np.ndarray:
    row, layer = places[name]
    found: Any = params()
    for part in row.ours.split("/"):
      found = found[part]
    array = np.asarray(found)
    array = array[layer] if LAYER in row.theirs else array
    return np.ascontiguousarray(array.T if row.turned else array)

  return Weights(source, model, their_shapes(model), read, **more)


def model_from_hf(given: Mapping[str, Any], source: str) -> ModelConfig:
  """The shape that a config.json of Hugging Face's describes.

  Raises:
    UserError: another architecture, a field missing, or a variant of LLaMA
      that `train/models/llama.py` does not compute.
  """
  kind = given.get("model_type")
  if kind != "llama":
    raise UserError(
      f"{source}: model_type is {kind!r}; only 'llama' can be read"
    )
  names = ("vocab_size", "hidden_size", "intermediate_size")
  names += ("num_hidden_layers", "num_attention_heads")
  missing = [name for name in names if name not in given]
  if missing:
    raise UserError(f"{source} has no {', '.join(missing)}")
  heads = given["num_attention_heads"]
  keys = given.get("num_key_value_heads") or heads
  _refuse_variants(given, source)
  rope = given.get("rope_parameters") or {}
  return ModelConfig(
    vocab_size=given["vocab_size"],
    d_model=given["hidden_size"],
    d_ff=given["intermediate_size"],
    n_layers=given["num_hidden_layers"],
    n_heads=heads,
    n_kv_heads=0 if keys == heads else keys,
    rope_theta=float(
      rope.get("rope_theta") or given.get("rope_theta") or 10000.0
    ),
    norm_eps=given.get("rms_norm_eps", 1e-6),
    init_std=given.get("initializer_range", 0.02),
    tie_embeddings=given.get("tie_word_embeddings", False),
  )


def _refuse_variants(given: Mapping[str, Any], source: str) -> None:
  width = given["hidden_size"] // given["num_attention_heads"]
  # The second spelling is of transformers 5, which writes it always.
  ropes = [
    given.get(name) or {} for name in ("rope_scaling", "rope_parameters")
  ]
  kinds = [rope.get("rope_type") or rope.get("type") for rope in ropes]
  scaled = [kind for kind in kinds if kind not in (None, "default")]
  computed = {
    "hidden_act": (given.get("hidden_act", "silu"), "silu"),
    "attention_bias": (bool(given.get("attention_bias")), False),
    "mlp_bias": (bool(given.get("mlp_bias")), False),
    "head_dim": (given.get("head_dim") or width, width),
    "rope_type": (next(iter(scaled), "default"), "default"),
  }
  for name, (value, known) in computed.items():
    if value != known:
      raise UserError(
        f"{source}: {name} is {value!r}; this model computes {known!r} only"
      )


def model_to_hf(
  model: ModelConfig, dtype: str, extra: Mapping[str, Any]
) -> dict[str, Any]:
  """The config.json that `transformers` reads.

  Args:
    model: the shape.
    dtype: of the stored tensors.
    extra: what is not the shape's: ids of tokens, `max_position_embeddings`.
  """
  return {
    **extra,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": model.vocab_size,
    "hidden_size": model.d_model,
    "intermediate_size": model.d_ff,
    "num_hidden_layers": model.n_layers,
    "num_attention_heads": model.n_heads,
    "num_key_value_heads": model.kv_heads,
    "head_dim": model.head_width,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": model.norm_eps,
    "initializer_range": model.init_std,
    "tie_word_embeddings": model.tie_embeddings,
    # Both spellings: of transformers before 5, and since.
    "rope_theta": model.rope_theta,
    "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
    "torch_dtype": dtype,
  }
