"""The families of LLaMA-like models, and which parts each may have.

`train/models/llama.py` computes any combination of these parts. A family is
what Hugging Face calls `model_type`: the combinations that its code computes,
so that every model that is trained can be exported.
"""

from typing import Any, Literal, NamedTuple

from train.common.errors import UserError

FamilyName = Literal[
  "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "smollm3"
]
ScalingName = Literal["none", "linear", "llama3", "yarn"]
BiasName = Literal["none", "qkv", "all"]


class Family(NamedTuple):
  """A family: what its models may have, and its own defaults in config.json."""

  architecture: str  # in config.json
  attention_bias: tuple[str, ...] = ("none",)
  mlp_bias: tuple[bool, ...] = (False,)
  qk_norm: tuple[bool, ...] = (False,)
  # Layers with a sliding window: none, all or none of them, or any.
  windows: Literal["none", "all", "any"] = "none"
  # Whether `use_sliding_window` in config.json turns the windows on.
  window_switch: bool = True
  # Whether the weights of a token's experts add up to 1.
  norm_topk_prob: tuple[bool, ...] = (True,)
  no_rope: bool = False  # whether there may be layers without rotations
  even_heads: bool = False  # whether heads must divide the hidden size
  # Fields of a config.json that lacks them.
  kv_heads: int = 0  # 0: as many as query heads
  head_dim: int = 0  # 0: the hidden size divided by the heads
  window: int = 4096
  theta: float = 10000.0
  eps: float = 1e-6
  tied: bool = False
  experts: int = 0  # 0: the family has no experts
  active_experts: int = 0
  expert_width: int = 0  # 0: the intermediate size


FAMILIES: dict[FamilyName, Family] = {
  "llama": Family(
    "LlamaForCausalLM",
    attention_bias=("none", "all"),
    mlp_bias=(False, True),
    even_heads=True,
  ),
  "mistral": Family(
    "MistralForCausalLM", windows="all", window_switch=False, kv_heads=8
  ),
  "mixtral": Family(
    "MixtralForCausalLM",
    windows="all",
    window_switch=False,
    kv_heads=8,
    window=0,
    theta=1e6,
    eps=1e-5,
    experts=8,
    active_experts=2,
  ),
  "qwen2": Family(
    "Qwen2ForCausalLM", attention_bias=("qkv",), windows="any", kv_heads=32
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM",
    attention_bias=("none", "all"),
    qk_norm=(True,),
    windows="any",
    kv_heads=32,
    head_dim=128,
  ),
  "qwen3_moe": Family(
    "Qwen3MoeForCausalLM",
    attention_bias=("none", "all"),
    qk_norm=(True,),
    windows="all",
    norm_topk_prob=(False, True),
    kv_heads=4,
    experts=128,
    active_experts=8,
    expert_width=768,
  ),
  "smollm3": Family(
    "SmolLM3ForCausalLM",
    attention_bias=("none", "all"),
    mlp_bias=(False, True),
    windows="any",
    no_rope=True,
    kv_heads=4,
    window=0,
    theta=2e6,
    tied=True,
  ),
}


# Fields of a model whose values a family lists.
PARTS = ("attention_bias", "mlp_bias", "qk_norm", "norm_topk_prob")


def layer_numbers(name: str, text: str, count: int) -> tuple[int, ...]:
  """Reads a list of layers, such as "3,7,11".

  Args:
    name: the field, for messages.
    text: numbers from 0, ascending, with commas; "" for none.
    count: layers of the model.

  Raises:
    UserError: it is no such list.
  """
  parts = text.split(",") if text else []
  numbers = [int(p) if p.strip().isdecimal() else -1 for p in parts]
  if numbers != sorted({*numbers}) or not all(0 <= n < count for n in numbers):
    raise UserError(
      f"model.{name} is {text!r:.60}; give ascending numbers of layers from 0"
      f" to {count - 1}, with commas, such as 0,{count - 1}"
    )
  return tuple(numbers)


def check(model: Any) -> None:
  """Refuses a model that its family does not have.

  Args:
    model: a `ModelConfig`.

  Raises:
    UserError: the message has the field and what would work.
  """
  family = FAMILIES[model.family]
  for name in PARTS:
    value, known = getattr(model, name), getattr(family, name)
    if value not in known:
      _refuse(model, name, " or ".join(str(x).lower() for x in known))
  if model.sliding_window and family.windows == "none":
    _refuse(model, "sliding_window", "0")
  if model.window_layers and family.windows != "any":
    _refuse(model, "window_layers", "none, which means all layers")
  if model.no_rope_layers and not family.no_rope:
    _refuse(model, "no_rope_layers", "none")
  _check_experts(model, family)
  if family.even_heads and model.d_model % model.n_heads:
    raise UserError(
      f"model.n_heads is {model.n_heads}, which does not divide"
      f" model.d_model={model.d_model}; transformers loads no such model of"
      f" model.family={model.family}"
    )


def _check_experts(model: Any, family: Family) -> None:
  """Refuses numbers of experts that the family does not have."""
  if model.n_experts and not family.experts:
    others = ", ".join(name for name, f in FAMILIES.items() if f.experts)
    raise UserError(
      f"model.n_experts is {model.n_experts}; model.family={model.family} has"
      f" none. Set model.n_experts to 0, or another model.family ({others})"
    )
  if family.experts and not model.n_experts:
    raise UserError(
      f"model.n_experts is 0, but model.family={model.family} has experts; give"
      f" their number, such as {family.experts}"
    )
  if model.n_experts and not 1 <= model.n_active_experts <= model.n_experts:
    raise UserError(
      f"model.n_active_experts is {model.n_active_experts}; of"
      f" model.n_experts={model.n_experts} a token takes 1 to all"
    )


def _refuse(model: Any, name: str, known: str) -> None:
  """Raises for a part that the family does not have."""
  value = getattr(model, name)
  shown = str(value).lower() if isinstance(value, bool) else value
  others = [
    other
    for other, family in FAMILIES.items()
    if name in PARTS and value in getattr(family, name)
  ]
  hint = f", or another model.family ({', '.join(others)})" if others else ""
  raise UserError(
    f"model.{name} is {shown}; model.family={model.family} has {known}. Set"
    f" model.{name} to that{hint}"
  )


def check_rope(model: Any) -> None:
  """Refuses scaled rotations that lack a number they depend on.

  Args:
    model: a `ModelConfig`.

  Raises:
    UserError: the message has the field and what would work.
  """
  scaling = model.rope_scaling
  if scaling == "none":
    return
  if not model.rope_factor >= 1:
    raise UserError(
      f"model.rope_factor is {model.rope_factor:g}; give 1 or more"
    )
  if scaling == "linear":
    return
  if model.rope_original_length < 1:
    raise UserError(
      f"model.rope_original_length is {model.rope_original_length}, and"
      f" model.rope_scaling={scaling}; give the length that the model was"
      " trained on before its rotations were scaled"
    )
  slow, fast = {
    "llama3": ("rope_low", "rope_high"),
    "yarn": ("rope_beta_slow", "rope_beta_fast"),
  }[scaling]
  if not 0 < getattr(model, slow) < getattr(model, fast):
    raise UserError(
      f"model.{slow} is {getattr(model, slow):g} and model.{fast}"
      f" {getattr(model, fast):g}; the second must be larger, both above 0"
    )
  if scaling == "yarn" and not model.rope_theta > 1:
    raise UserError(
      f"model.rope_theta is {model.rope_theta:g}; for model.rope_scaling=yarn"
      " give more than 1"
    )
