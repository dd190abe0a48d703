"""How config.json describes rotary embeddings, and how our config does.

`rope_scaling` is the spelling of `transformers` before version 5, and
`rope_parameters` that of version 5, which always writes it.
"""

import math
from typing import Any

from train.common.errors import UserError
from train.common.fields import Fields
from train.config.schema import ModelConfig
from train.models import rope
from train.pretrained import mapping

SPELLINGS = ("rope_scaling", "rope_parameters")
# The fields of each kind, besides those that every kind has.
COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
KNOWN = {
  "default": (),
  "linear": ("factor",),
  "llama3": (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
  ),
  "yarn": (
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "finetuned",  # says how the model was made
  ),
}


def from_hf(fields: Fields, theta: float) -> dict[str, Any]:
  """The fields of our config whose names begin with `rope_`.

  Args:
    fields: those of config.json.
    theta: the base, if no field says it.

  Raises:
    UserError: the kind of scaling, or one of its fields, is not known; a field
      is missing, or two contradict each other.
  """
  _refuse_partial(fields)
  groups = [fields.group(name) for name in SPELLINGS]
  given = [(g, _kind(g)) for g in groups if g.values]
  found = [_scaling(fields, group, kind) for group, kind in given]
  if len(found) == 2 and found[0] != found[1]:
    raise UserError(
      f"{fields.source}: rope_scaling and rope_parameters describe different"
      " rotary embeddings; delete the one that is wrong"
    )
  thetas = [group.number("rope_theta", 0.0) for group in reversed(groups)]
  older = fields.number("rope_theta", 0.0)
  chosen = next(filter(None, (*thetas, older)), theta)
  return {"rope_theta": chosen, **(found[0] if found else {})}


def _refuse_partial(fields: Fields) -> None:
  """Raises where only a part of each head is rotated."""
  share = fields.number("partial_rotary_factor", 1.0)
  mapping.refuse_variants(
    fields.source, {"partial_rotary_factor": (share, (1.0,))}
  )


def _kind(group: Fields) -> str:
  """The kind of scaling; `default` for none."""
  kinds = [group.text(name, "") for name in ("rope_type", "type")]
  kind = next(filter(None, kinds), "default")
  values = {"rope_type": (kind, tuple(KNOWN))}
  if all(kinds):
    values["type"] = (kinds[1], (kind,))
  mapping.refuse_variants(group.source, values)
  return kind


def _scaling(fields: Fields, group: Fields, kind: str) -> dict[str, Any]:
  """Our fields of one spelling."""
  _refuse_partial(group)
  for name in group.values.keys() - {*COMMON, *KNOWN[kind]}:
    if group.has(name):
      group.refuse(name, f"absent, as it is not known for rope_type={kind}")
  if kind == "default":
    return {}
  found = {
    "rope_scaling": kind,
    "rope_factor": group.number("factor", low=1.0),
  }
  if kind == "linear":
    return found
  found["rope_original_length"] = _original_length(fields, group)
  if kind == "llama3":
    return found | {
      "rope_low": group.number("low_freq_factor", low=0.0),
      "rope_high": group.number("high_freq_factor", low=0.0),
    }
  return found | _yarn(group, found["rope_factor"])


def _original_length(fields: Fields, group: Fields) -> int:
  """The length before scaling; as in `transformers`, the outer one counts."""
  name = "original_max_position_embeddings"
  for place in (fields, group):
    if place.has(name):
      return place.integer(name, low=1)
  if fields.has("max_position_embeddings"):
    return fields.integer("max_position_embeddings", low=1)
  return group.integer(name)  # raises: it is missing


def _yarn(group: Fields, factor: float) -> dict[str, Any]:
  """The fields that only YaRN has."""
  rounds = group.flag("truncate", True)
  mapping.refuse_variants(group.source, {"truncate": (rounds, (True,))})
  usual = _enlargement(factor, 1.0)
  size = group.number("attention_factor", 0.0, low=0.0)
  if not group.has("attention_factor"):
    scales = [group.number(n, 0.0) for n in ("mscale", "mscale_all_dim")]
    size = usual
    if all(scales):
      size = _enlargement(factor, scales[0]) / _enlargement(factor, scales[1])
  elif not size:
    group.refuse("attention_factor", "a number above 0")
  return {
    "rope_beta_fast": group.number("beta_fast", 32.0) or 32.0,
    "rope_beta_slow": group.number("beta_slow", 1.0) or 1.0,
    "rope_attention_factor": 0.0 if math.isclose(size, usual) else size,
  }


def _enlargement(factor: float, scale: float) -> float:
  return 0.1 * scale * math.log(factor) + 1.0


def to_hf(model: ModelConfig) -> dict[str, Any]:
  """The fields of config.json in both spellings."""
  kind = model.rope_scaling
  scaling: dict[str, Any] = {"rope_type": "default" if kind == "none" else kind}
  if kind != "none":
    scaling["factor"] = model.rope_factor
  if kind in ("llama3", "yarn"):
    name = "original_max_position_embeddings"
    scaling[name] = model.rope_original_length
  if kind == "llama3":
    scaling["low_freq_factor"] = model.rope_low
    scaling["high_freq_factor"] = model.rope_high
  if kind == "yarn":
    scaling["beta_fast"] = model.rope_beta_fast
    scaling["beta_slow"] = model.rope_beta_slow
    scaling["attention_factor"] = rope.enlargement(rope.of(model))
  theta = {"rope_theta": model.rope_theta}
  older = {} if kind == "none" else {"rope_scaling": scaling | theta}
  return {**theta, **older, "rope_parameters": scaling | theta}
