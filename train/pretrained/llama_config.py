"""The config of LLaMA and its relatives, at Hugging Face and here."""

from collections.abc import Mapping
from typing import Any

from train.common.errors import UserError
from train.common.fields import Fields
from train.config.families import FAMILIES, Family, FamilyName
from train.config.schema import ModelConfig
from train.pretrained import experts_config, mapping, rope_config

# Layers of a family whose layers may differ, at most: they are listed before
# anything shows that a number of layers is damaged.
MOST_LAYERS = 10_000
FULL, SLIDING = "full_attention", "sliding_attention"


def from_hf(given: Mapping[str, Any], source: str) -> ModelConfig:
  """The model that a config.json of Hugging Face describes.

  Args:
    given: the content of config.json.
    source: its path, as messages call it.

  Raises:
    UserError: another architecture, a field missing, or a variant that
      `train/models/llama.py` does not implement.
  """
  kind: Any = given.get("model_type")
  if kind == "qwen2_moe":
    raise UserError(
      f"{source}: model_type is 'qwen2_moe', whose layers have a shared expert"
      " besides the others, which is not implemented; of mixtures of experts"
      " 'mixtral' and 'qwen3_moe' can be read"
    )
  if kind not in tuple(FAMILIES):  # it may be of any type
    known = ", ".join(map(repr, FAMILIES))
    raise UserError(
      f"{source}: model_type is {kind!r:.60}; only {known} can be read"
    )
  fields, family = Fields(source, given), FAMILIES[kind]
  sizes: dict[str, Any] = mapping.sizes_from_hf(fields)
  sizes |= experts_config.from_hf(fields, family)
  if family.windows == "any" and sizes["n_layers"] > MOST_LAYERS:
    fields.refuse("num_hidden_layers", f"{MOST_LAYERS} at most")
  act = fields.text("hidden_act", "silu")
  mapping.refuse_variants(source, {"hidden_act": (act, ("silu",))})
  still = _layers_without_rope(fields, family, sizes["n_layers"])
  with mapping.naming(source):
    return ModelConfig(
      **sizes,
      family=kind,
      **_heads(fields, family, sizes),
      **_extra_parts(fields, family),
      **_windows(fields, kind, sizes["n_layers"], still),
      **rope_config.from_hf(fields, family.theta),
      no_rope_layers=_numbers(still),
      norm_eps=fields.number("rms_norm_eps", family.eps),
      init_std=fields.number("initializer_range", 0.02),
      tie_embeddings=fields.flag("tie_word_embeddings", family.tied),
    )


def _numbers(layers: tuple[int, ...]) -> str:
  return ",".join(map(str, layers))


def _heads(
  fields: Fields, family: Family, sizes: Mapping[str, int]
) -> dict[str, Any]:
  """Key and value heads and the width of heads; 0 where it follows."""
  heads, name = sizes["n_heads"], "num_key_value_heads"
  kv_heads = fields.integer(name, 0)
  if name not in fields.values:  # null is as many as query heads
    kv_heads = family.kv_heads
  width = fields.integer("head_dim", family.head_dim)
  usual = width * heads == sizes["d_model"]
  return {
    "n_kv_heads": 0 if kv_heads == heads else kv_heads,
    "head_dim": 0 if usual else width,
  }


def _extra_parts(fields: Fields, family: Family) -> dict[str, Any]:
  """Biases, and norms of queries and keys.

  Families that always have them, or never, do not read the fields. Where a
  checkpoint means something else, its tensors do not fit.
  """
  bias, mlp_bias = family.attention_bias[0], False
  if "all" in family.attention_bias and fields.flag("attention_bias", False):
    bias = "all"
  if True in family.mlp_bias:
    mlp_bias = fields.flag("mlp_bias", False)
  return {
    "attention_bias": bias,
    "mlp_bias": mlp_bias,
    "qk_norm": family.qk_norm[0],
  }


def _layers_without_rope(
  fields: Fields, family: Family, count: int
) -> tuple[int, ...]:
  """Numbers of the layers without rotary embeddings."""
  name = "no_rope_layers"
  rotates = fields.integers(name, None)
  if rotates is None and family.no_rope:
    interval = fields.integer("no_rope_layer_interval", 4, low=1)
    rotates = [(i + 1) % interval for i in range(count)]
  if rotates is None:
    return ()
  if len(rotates) < count:
    fields.refuse(name, f"a list with a number for each of {count} layers")
  still = tuple(i for i in range(count) if not rotates[i])
  if still and not family.no_rope:
    fields.refuse(name, "absent: this model_type rotates in every layer")
  return still


def _windows(
  fields: Fields, kind: FamilyName, count: int, still: tuple[int, ...]
) -> dict[str, Any]:
  """The sliding window, and the layers that have it.

  Args:
    fields: those of config.json.
    kind: the model_type.
    count: layers of the model.
    still: layers without rotary embeddings.
  """
  family = FAMILIES[kind]
  size = _window(fields, kind)
  types = _layer_types(fields, count)
  if family.windows != "any":  # all layers are alike, whatever it says
    expected = SLIDING if size else FULL
    if types and {*types} != {expected}:
      fields.refuse(
        "layer_types",
        f"{expected} for every layer, for model_type={kind} and"
        f" sliding_window={size or 'null'}",
      )
    return {"sliding_window": size}
  if types:
    layers = tuple(i for i in range(count) if types[i] == SLIDING)
  elif kind == "smollm3":
    layers = still if size else ()
  else:
    first = fields.integer("max_window_layers", 28)
    layers = tuple(range(first, count)) if size else ()
  if layers and not size:
    fields.refuse(
      "layer_types",
      f"{FULL} for every layer where use_sliding_window is not true, or"
      " sliding_window null",
    )
  every = len(layers) == count
  return {
    "sliding_window": size if layers else 0,
    "window_layers": "" if every else _numbers(layers),
  }


def _window(fields: Fields, kind: FamilyName) -> int:
  """The size of the window; 0: none."""
  name, switch = "sliding_window", "use_sliding_window"
  given = fields.integer(name, 0, low=0)
  on = fields.flag(switch, False)
  if kind == "llama":
    if given or on:
      fields.refuse(
        name if given else switch, "absent: model_type=llama has no window"
      )
    return 0
  family = FAMILIES[kind]
  if family.window_switch and not on:
    return 0
  if name not in fields.values and family.window:
    return family.window
  if fields.has(name) and not given:
    fields.refuse(name, "a whole number above 0, or null for no window")
  return given


def _layer_types(fields: Fields, count: int) -> list[str]:
  """The kind of attention of each layer; [] where it is not said."""
  types = fields.texts("layer_types", None)
  if types is None:
    return []
  if len(types) != count or not {*types} <= {FULL, SLIDING}:
    fields.refuse(
      "layer_types", f"{FULL} or {SLIDING} for each of {count} layers"
    )
  return types


def to_hf(
  model: ModelConfig, dtype: str, extra: Mapping[str, Any]
) -> dict[str, Any]:
  """The config.json that `transformers` reads.

  Args:
    model: the model.
    dtype: of the stored tensors.
    extra: other fields: ids of special tokens, `max_position_embeddings`.
  """
  family = FAMILIES[model.family]
  return {
    **extra,
    "architectures": [family.architecture],
    "model_type": model.family,
    **mapping.sizes_to_hf(model),
    "num_key_value_heads": model.kv_heads,
    "head_dim": model.head_width,
    "hidden_act": "silu",
    **experts_config.to_hf(model),
    **_biases_to_hf(model, family),
    **_windows_to_hf(model, family),
    "rms_norm_eps": model.norm_eps,
    "initializer_range": model.init_std,
    "tie_word_embeddings": model.tie_embeddings,
    **rope_config.to_hf(model),
    "torch_dtype": dtype,
  }


def _biases_to_hf(model: ModelConfig, family: Family) -> dict[str, bool]:
  """Which layers have biases, of families that may or may not have them."""
  found = {}
  if len(family.attention_bias) > 1:
    found["attention_bias"] = model.attention_bias != "none"
  if len(family.mlp_bias) > 1:
    found["mlp_bias"] = model.mlp_bias
  return found


def _windows_to_hf(model: ModelConfig, family: Family) -> dict[str, Any]:
  """Sliding windows, and layers without rotary embeddings."""
  found: dict[str, Any] = {}
  if family.no_rope:
    still, layers = model.layers_without_rope, range(model.n_layers)
    found["no_rope_layers"] = [int(i not in still) for i in layers]
  size = model.sliding_window or None
  if family.windows == "all":
    switch = {"use_sliding_window": size is not None}
    return {"sliding_window": size} | (switch if family.window_switch else {})
  if family.windows == "none":
    return found
  windowed = model.layers_with_window
  return found | {
    "use_sliding_window": size is not None,
    "sliding_window": size,
    # Read by versions of transformers that do not know layer_types.
    "max_window_layers": min(windowed, default=model.n_layers),
    "layer_types": [
      SLIDING if i in windowed else FULL for i in range(model.n_layers)
    ],
  }
