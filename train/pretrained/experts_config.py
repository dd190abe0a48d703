"""Mixtures of experts: the fields of config.json, here and at Hugging Face."""

from collections.abc import Sequence
from typing import Any

from train.common.fields import Fields
from train.config.families import FAMILIES, Family
from train.config.schema import ModelConfig

# Newer versions of transformers write the first name for every family, and
# older ones the second for Qwen3.
COUNTS = ("num_local_experts", "num_experts")
WIDTH = "moe_intermediate_size"
# Fields that are known with these values only.
USUAL: dict[str, Sequence[Any]] = {
  "router_jitter_noise": (0, 0.0, None),
  "decoder_sparse_step": (1, None),
  "mlp_only_layers": ([], None),
  "shared_expert_intermediate_size": (0, None),
  "n_shared_experts": (0, None),
}
WORKS = {
  "router_jitter_noise": "0: no noise is added to what experts read",
  "decoder_sparse_step": "1: every layer has experts",
  "mlp_only_layers": "empty: every layer has experts",
}


def from_hf(fields: Fields, family: Family) -> dict[str, Any]:
  """The experts that a config.json describes, as fields of our config.

  Args:
    fields: those of config.json.
    family: that of its model_type.

  Raises:
    UserError: a field is missing or wrong, or means another computation.
  """
  if not family.experts:
    return {}
  for name, known in USUAL.items():
    if fields.values.get(name) not in known:
      fields.refuse(name, WORKS.get(name, "0: there are no shared experts"))
  found: dict[str, Any] = {
    "n_experts": _count(fields, family),
    "n_active_experts": fields.integer(
      "num_experts_per_tok", family.active_experts, low=1
    ),
    "router_aux_loss_coef": fields.number("router_aux_loss_coef", 0.001),
  }
  if family.expert_width:
    found["d_ff"] = fields.integer(WIDTH, family.expert_width, low=1)
  if len(family.norm_topk_prob) > 1:
    found["norm_topk_prob"] = fields.flag("norm_topk_prob", False)
  return found


def _count(fields: Fields, family: Family) -> int:
  """The number of experts, by either of its names."""
  given = {
    name: fields.integer(name, low=1) for name in COUNTS if fields.has(name)
  }
  if len({*given.values()}) > 1:
    first, second = given
    fields.refuse(first, f"{given[second]}, which is {second}")
  return next(iter(given.values()), family.experts)


def to_hf(model: ModelConfig) -> dict[str, Any]:
  """The fields of config.json; none of a model without experts."""
  family = FAMILIES[model.family]
  if not model.n_experts:
    return {}
  count = COUNTS[1] if family.expert_width else COUNTS[0]
  found: dict[str, Any] = {
    count: model.n_experts,
    "num_experts_per_tok": model.n_active_experts,
    "router_aux_loss_coef": model.router_aux_loss_coef,
  }
  if family.expert_width:
    # No layer has the width `intermediate_size`: all have experts.
    found |= {WIDTH: model.d_ff, "decoder_sparse_step": 1}
    found["mlp_only_layers"] = []
  if len(family.norm_topk_prob) > 1:
    found["norm_topk_prob"] = model.norm_topk_prob
  return found
