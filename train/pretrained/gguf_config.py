"""The fields of a GGUF file under the names of config.json.

A field that this file does not know is refused, because it may change what is
computed.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from train.common.errors import UserError
from train.common.fields import Fields
from train.models import rope

# A `llama` with experts is a Mixtral.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe")
# LLaMA 3's scaling of rotary embeddings: factors that divide the frequencies.
ROPE_SCALES = "rope_freqs.weight"
SIZES = {
  "embedding_length": "hidden_size",
  "feed_forward_length": "intermediate_size",
  "block_count": "num_hidden_layers",
  "attention.head_count": "num_attention_heads",
  "attention.head_count_kv": "num_key_value_heads",
  "attention.key_length": "head_dim",
  "context_length": "max_position_embeddings",
}
MAY_BE_0 = ("attention.head_count_kv",)  # as many as query heads
EXPERTS = {
  "expert_count": "num_local_experts",
  "expert_used_count": "num_experts_per_tok",
}
EXPERT_WIDTH = "expert_feed_forward_length"  # of `qwen3moe`
NUMBERS = {
  "rope.freq_base": "rope_theta",
  "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# Fields that are checked below, or that change nothing.
OTHERS = (
  "attention.value_length",
  "rope.dimension_count",
  "rope.scale_linear",
  "rope.scaling.type",
  "rope.scaling.factor",
  "rope.scaling.original_context_length",
  "rope.scaling.finetuned",
  "rope.scaling.yarn_beta_fast",
  "rope.scaling.yarn_beta_slow",
  "vocab_size",
)
# Fields that are known with one value only: what they are without the field.
USUAL = {
  "attention.causal": True,
  "attention.sliding_window": 0,
  "rope.scaling.attn_factor": 1.0,
  "rope.scaling.yarn_attn_factor": 1.0,
  "rope.scaling.yarn_ext_factor": 1.0,
  "rope.scaling.yarn_log_multiplier": 0.0,
  "tensor_data_layout": "Meta AI original pth",
}


def to_hf(
  fields: Fields, tensors: Iterable[str], factors: np.ndarray | None
) -> dict[str, Any]:
  """The fields of the file under the names of config.json.

  Args:
    fields: those of the file.
    tensors: names of its tensors.
    factors: its tensor `ROPE_SCALES`; None: it has none.

  Raises:
    UserError: another architecture, or a field that is not known, or is not
      what it must be.
  """
  kind = fields.values.get("general.architecture")
  if kind not in ARCHITECTURES:
    known = ", ".join(map(repr, ARCHITECTURES))
    raise UserError(
      f"{fields.source}: general.architecture is {kind!r:.60}; only {known} can"
      " be read"
    )
  prefix = f"{kind}."
  own = {
    name.removeprefix(prefix): value
    for name, value in fields.values.items()
    if name.startswith(prefix)
  }
  given = Fields(fields.source, own, prefix)
  experts = _experts(given, kind)
  _refuse_unknown(given, experts)
  config: dict[str, Any] = {
    theirs: given.integer(ours, low=0 if ours in MAY_BE_0 else 1)
    for ours, theirs in SIZES.items()
    if given.has(ours)
  }
  for ours, theirs in NUMBERS.items():
    if given.has(ours):
      config[theirs] = _rounded(given.number(ours))
  names = {*tensors}
  config |= {
    **experts,
    "model_type": _family(kind, experts),
    "num_key_value_heads": config.get("num_key_value_heads", 0),
    "vocab_size": len(fields.texts("tokenizer.ggml.tokens")),
    "tie_word_embeddings": "output.weight" not in names,
    "attention_bias": "blk.0.attn_q.bias" in names,
    "mlp_bias": "blk.0.ffn_gate.bias" in names,
    "use_sliding_window": False,
  }
  _check_widths(given, config)
  return config | {"rope_scaling": _scaling(given, config, factors)}


def _rounded(value: float) -> float:
  """A number that is stored as float32: 1e-5 reads as 9.99999974e-06."""
  return float(f"{value:.7g}")


def _family(kind: str, experts: Mapping[str, Any]) -> str:
  """The model_type of an architecture."""
  if kind == "qwen3moe":
    return "qwen3_moe"
  return "mixtral" if experts else kind


def _experts(given: Fields, kind: str) -> dict[str, Any]:
  """The experts under the names of config.json; {} where there are none.

  The weights of a token's experts add up to 1, which llama.cpp computes for
  both architectures, whatever the model's own config says.
  """
  if kind == "llama" and not given.integer("expert_count", 0):
    return {}
  if kind not in ("llama", "qwen3moe"):
    return {}
  found = {
    theirs: given.integer(ours, low=1) for ours, theirs in EXPERTS.items()
  }
  if kind == "qwen3moe":
    found["moe_intermediate_size"] = given.integer(EXPERT_WIDTH, low=1)
    found["norm_topk_prob"] = True
  return found


def _refuse_unknown(given: Fields, experts: Mapping[str, Any]) -> None:
  """Raises for a field that may change what is computed."""
  usual = USUAL | ({} if experts else dict.fromkeys(EXPERTS, 0))
  known = {*SIZES, *NUMBERS, *OTHERS, *usual, *(EXPERTS if experts else ())}
  known |= {EXPERT_WIDTH} if "moe_intermediate_size" in experts else set()
  for name, value in given.values.items():
    if name in usual and value != usual[name]:
      given.refuse(name, f"{usual[name]!r}, or absent")
    if name not in known:
      given.refuse(name, "absent, as it is not known")


def _check_widths(given: Fields, config: Mapping[str, Any]) -> None:
  """Raises unless keys and values are equally wide, and rotated whole."""
  width = config.get("head_dim")
  if width is None and {"hidden_size", "num_attention_heads"} <= {*config}:
    width = config["hidden_size"] // config["num_attention_heads"]
  for name, of in (
    ("attention.value_length", "values of another width than keys"),
    ("rope.dimension_count", "rotary embeddings of a part of a head"),
  ):
    found = given.integer(name, width)
    if width is not None and found != width:
      raise UserError(
        f"{given.source}: {config['model_type']}.{name} is {found}, of heads of"
        f" width {width}; {of} cannot be read"
      )


def _scaling(
  given: Fields, config: Mapping[str, Any], factors: np.ndarray | None
) -> dict[str, Any] | None:
  """The `rope_scaling` of config.json."""
  kind, factor = _kind_and_factor(given)
  if factors is not None and kind != "none":
    raise UserError(
      f"{given.source}: it scales rotary embeddings by rope.scaling.type={kind}"
      f" and by the tensor {ROPE_SCALES}, which cannot be read together"
    )
  if factors is not None:
    return _llama3(given, config, factors)
  if kind == "none":
    return None
  if kind == "linear":
    return {"rope_type": kind, "factor": factor}
  beta = "rope.scaling.yarn_beta_"
  return {
    "rope_type": kind,
    "factor": factor,
    "original_max_position_embeddings": given.integer(
      "rope.scaling.original_context_length", low=1
    ),
    "beta_fast": given.number(f"{beta}fast", 32.0),
    "beta_slow": given.number(f"{beta}slow", 1.0),
  }


def _kind_and_factor(given: Fields) -> tuple[str, float]:
  """The kind of scaling, and its factor: llama.cpp's are 0 or 1 for none."""
  kind = given.choice("rope.scaling.type", ("none", "linear", "yarn"), None)
  # Older files have the second name.
  names = ("rope.scaling.factor", "rope.scale_linear")
  factors = {name: _rounded(given.number(name, 1.0)) or 1.0 for name in names}
  name = next((n for n in names if given.has(n)), names[0])
  factor = factors[name]
  if kind == "none" and factor != 1.0:
    given.refuse(name, "1, or absent, for rope.scaling.type=none")
  if kind is None:  # a factor without a type scales linearly
    kind = "linear"
  if kind == "linear" and factor == 1.0:
    return "none", 1.0
  return kind, factor


def _llama3(
  given: Fields, config: Mapping[str, Any], factors: np.ndarray
) -> dict[str, Any] | None:
  """LLaMA 3's scaling whose factors these are.

  The file has no other trace of it. All published models share the numbers
  1, 4 and 8192; the slowest frequency is divided by the whole factor.
  """
  width = 2 * factors.size
  found = rope.Rope(
    width,
    config.get("rope_theta", 10000.0),
    "llama3",
    float(factors.max(initial=1.0)),
    original=8192,
  )
  plain = rope.frequencies(found._replace(scaling="none"))
  scaled = plain / rope.frequencies(found)
  if not np.allclose(scaled, factors.ravel(), rtol=1e-4, atol=0):
    raise UserError(
      f"{given.source}: the factors of rotary embeddings in {ROPE_SCALES} are"
      " not those of LLaMA 3 (low_freq_factor 1, high_freq_factor 4,"
      " original_max_position_embeddings 8192), and cannot be read"
    )
  if found.factor == 1.0:
    return None
  return {
    "rope_type": "llama3",
    "factor": found.factor,
    "low_freq_factor": found.low,
    "high_freq_factor": found.high,
    "original_max_position_embeddings": found.original,
  }
