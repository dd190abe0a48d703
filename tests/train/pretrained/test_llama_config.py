"""Configs of LLaMA and its relatives: what is read, and what is refused."""

import dataclasses
from typing import Any

import pytest

from tests.train.conftest import TINY
from train.common.errors import UserError
from train.config.schema import ModelConfig
from train.pretrained import llama_config, llama_names

SIZES = {
  "vocab_size": 300,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 32.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
YARN = {
  "rope_type": "yarn",
  "factor": 4.0,
  "original_max_position_embeddings": 32768,
}


def read(kind: str, **fields: Any) -> ModelConfig:
  given = {"model_type": kind, **SIZES, **fields}
  return llama_config.from_hf(given, "config.json")


def tiny(family: Any, **fields: Any) -> ModelConfig:
  return dataclasses.replace(TINY, n_layers=4, family=family, **fields)


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    # Fields that are absent have the defaults of their family.
    ({"model_type": "llama"}, tiny("llama")),
    (
      {"model_type": "mistral", "num_key_value_heads": 4},
      tiny("mistral", sliding_window=4096),
    ),
    (
      {"model_type": "qwen2", "num_key_value_heads": 2},
      tiny("qwen2", n_kv_heads=2, attention_bias="qkv"),
    ),
    (
      {"model_type": "mixtral", "num_key_value_heads": 4},
      tiny("mixtral", n_experts=8, rope_theta=1e6, norm_eps=1e-5),
    ),
    (
      {"model_type": "qwen3_moe", "num_experts": 9, "head_dim": 6},
      tiny(
        "qwen3_moe",
        d_ff=768,
        head_dim=6,
        qk_norm=True,
        n_experts=9,
        n_active_experts=8,
        norm_topk_prob=False,
      ),
    ),
    (
      {"model_type": "qwen3", "num_key_value_heads": None},
      tiny("qwen3", head_dim=128, qk_norm=True),
    ),
    (
      {"model_type": "smollm3"},
      tiny(
        "smollm3",
        no_rope_layers="3",
        tie_embeddings=True,
        rope_theta=2e6,
      ),
    ),
    # As published, but for the sizes.
    (  # Llama 3.2
      {
        "model_type": "llama",
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3,
        "tie_word_embeddings": True,
      },
      tiny(
        "llama",
        n_kv_heads=1,
        rope_theta=5e5,
        rope_scaling="llama3",
        rope_factor=32.0,
        rope_original_length=8192,
        tie_embeddings=True,
      ),
    ),
    (  # Qwen2.5: a window that is not used
      {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "max_window_layers": 2,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "rope_scaling": YARN,
      },
      tiny(
        "qwen2",
        n_kv_heads=2,
        attention_bias="qkv",
        rope_scaling="yarn",
        rope_factor=4.0,
        rope_original_length=32768,
      ),
    ),
    (  # SmolLM3
      {
        "model_type": "smollm3",
        "num_key_value_heads": 4,
        "layer_types": ["full_attention"] * 4,
        "no_rope_layers": [1, 0, 1, 0],
        "no_rope_layer_interval": 4,
        "rope_theta": 5e6,
        "sliding_window": None,
        "use_sliding_window": False,
        "attention_bias": False,
        "mlp_bias": False,
      },
      tiny(
        "smollm3",
        no_rope_layers="1,3",
        tie_embeddings=True,
        rope_theta=5e6,
      ),
    ),
    (  # a window from a layer on, and by names
      {
        "model_type": "qwen2",
        "num_key_value_heads": 4,
        "use_sliding_window": True,
        "max_window_layers": 2,
      },
      tiny(
        "qwen2",
        attention_bias="qkv",
        sliding_window=4096,
        window_layers="2,3",
      ),
    ),
  ],
)
def test_configs_are_read_and_written(fields, expected):
  found = read(fields["model_type"], **fields)
  assert found == expected
  written = llama_config.to_hf(found, "float32", {})
  assert llama_config.from_hf(written, "") == found


@pytest.mark.parametrize(
  ("kind", "fields", "message"),
  [
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama", {"sliding_window": 8}, "sliding_window is 8; .*has no window"),
    ("llama", {"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers is .*rotates"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "a number for each of 4 layers"),
    (
      "qwen2",
      {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]},
      "layer_types is .* full_attention or sliding_attention for each of 4",
    ),
    (
      "qwen3",
      {"layer_types": ["sliding_attention"] * 4},
      "layer_types is .*use_sliding_window is not true",
    ),
    (
      "mistral",
      {"layer_types": ["full_attention"] * 4},
      "layer_types is .*sliding_attention for every layer, .*=4096",
    ),
    (
      "smollm3",
      {"num_hidden_layers": 10**9},
      "num_hidden_layers is 1000000000",
    ),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0; .*null for no"),
    ("llama", {"num_attention_heads": 3, "head_dim": 8}, "n_heads is 3, which"),
    ("qwen2_moe", {}, "'qwen2_moe', whose layers have a shared expert"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, r"only_layers is \[1\]; .*empty"),
    (
      "qwen3_moe",
      {"decoder_sparse_step": 2},
      "step is 2; .*every layer",
    ),
    ("mixtral", {"router_jitter_noise": 0.1}, "jitter_noise is 0.1; .*noise"),
    (
      "qwen3_moe",
      {"shared_expert_intermediate_size": 8},
      "intermediate_size is 8; .*no shared experts",
    ),
    (
      "qwen3_moe",
      {"num_experts": 4, "num_local_experts": 8},
      "num_local_experts is 8; it must be 4, which is num_experts",
    ),
    ("mixtral", {"num_local_experts": 0}, "num_local_experts is 0"),
    ("llama", {"head_dim": 7}, "head_dim is 7"),
  ],
)
def test_what_a_family_does_not_compute_is_refused(kind, fields, message):
  with pytest.raises(UserError, match=f"config.json: .*{message}"):
    read(kind, **fields)


def test_a_damaged_number_of_layers_takes_no_time():
  many = {"num_hidden_layers": 10**9, "num_key_value_heads": 4}
  assert len(read("mistral", **many).layers_with_window) == 10**9


@pytest.mark.parametrize(
  ("scaling", "message"),
  [
    ({"type": "dynamic", "factor": 2.0}, "rope_type is 'dynamic'"),
    ({"rope_type": "longrope", "factor": 2.0}, "rope_type is 'longrope'"),
    ({"rope_type": "linear"}, "has no rope_scaling.factor"),
    ({"type": "linear", "rope_type": "yarn"}, "type is 'linear'; .*'yarn'"),
    (
      {"rope_type": "linear", "factor": 0.5},
      r"rope_scaling.factor is 0.5; .*1 or more",
    ),
    (
      {"rope_type": "linear", "factor": 2.0, "beta_fast": 3},
      "rope_scaling.beta_fast is 3; .*not known for rope_type=linear",
    ),
    (YARN | {"truncate": False}, "truncate is False"),
    (YARN | {"attention_factor": 0}, "attention_factor is 0; .*above 0"),
    (YARN | {"mrope_section": [1]}, "rope_scaling.mrope_section is"),
    (LLAMA3 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    (LLAMA3 | {"low_freq_factor": 4.0}, "rope_low is 4 and model.rope_high 4"),
    (
      {k: v for k, v in LLAMA3.items() if not k.startswith("original")},
      "has no rope_scaling.original_max_position_embeddings",
    ),
    (
      {"full_attention": {"rope_type": "default"}},
      "rope_scaling.full_attention is",
    ),
  ],
)
def test_rotations_that_are_not_known_are_refused(scaling, message):
  with pytest.raises(UserError, match=message):
    read("llama", rope_scaling=scaling)


def test_two_spellings_that_contradict_each_other_are_refused():
  with pytest.raises(UserError, match="describe different rotary embeddings"):
    read("llama", rope_scaling=LLAMA3, rope_parameters={"rope_type": "default"})


def test_the_original_length_may_be_that_of_the_config():
  less = {k: v for k, v in YARN.items() if not k.startswith("original")}
  within = {"rope_parameters": less, "max_position_embeddings": 77}
  assert read("llama", **within).rope_original_length == 77
  outside = within | {"original_max_position_embeddings": 66}
  assert read("llama", **outside).rope_original_length == 66


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"qk_norm": True}, r"qk_norm is true; .*llama has false.*\(qwen3, "),
    ({"family": "qwen2"}, "attention_bias is none; .*qwen2 has qkv"),
    ({"mlp_bias": True, "family": "mistral"}, r"mlp_bias.*\(llama, smollm3\)"),
    ({"sliding_window": 4}, "sliding_window is 4; model.family=llama has 0"),
    (
      {"family": "mistral", "sliding_window": 4, "window_layers": "0"},
      "window_layers is 0; .*all layers",
    ),
    ({"no_rope_layers": "1"}, "no_rope_layers is 1; .*has none"),
    ({"family": "smollm3", "no_rope_layers": "1,0"}, "'1,0'; give ascending"),
    ({"family": "smollm3", "no_rope_layers": "4"}, "'4'; .*from 0 to 3"),
    ({"family": "smollm3", "no_rope_layers": "x"}, "'x'; give ascending"),
    ({"family": "smollm3", "window_layers": "1"}, "set model.sliding_window"),
    ({"rope_scaling": "yarn"}, "rope_original_length is 0"),
    ({"rope_scaling": "linear", "rope_factor": 0.0}, "rope_factor is 0"),
    ({"n_heads": 3, "head_dim": 8}, "n_heads is 3, which does not divide"),
    ({"n_experts": 4}, r"n_experts is 4; .*has none.*\(mixtral, qwen3_moe\)"),
    ({"family": "mixtral"}, "mixtral has experts; give their number"),
    ({"family": "mixtral", "n_experts": 1}, "active_experts is 2; of"),
    (
      {"family": "mixtral", "n_experts": 4, "norm_topk_prob": False},
      "norm_topk_prob is false; .*mixtral has true",
    ),
  ],
)
def test_settings_that_no_family_has_are_refused(fields, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(TINY, n_layers=4, **fields)


def test_a_damaged_number_of_experts_takes_no_time():
  many = {"num_experts": 10**9, "num_experts_per_tok": 2, "head_dim": 8}
  with pytest.raises(UserError, match="4,000,000,000 experts in all layers"):
    llama_names.check_layers(read("qwen3_moe", **many), 100, "m")
