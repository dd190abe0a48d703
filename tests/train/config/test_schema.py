import math

import jax
import pytest

from train.common.errors import UserError
from train.config import presets, schema
from train.models import llama

BASE = presets.make("sotu_small", "galore")


def test_overrides_of_every_type_in_one_go():
  changed = schema.override(
    BASE,
    [
      "optimizer.rank=32",
      "optimizer.learning_rate=2e-3",
      "model.tie_embeddings=true",
      "model.dtype=bfloat16",
      "data.path=/a=b.txt",
      "train.steps=1_000",
    ],
  )
  assert changed.optimizer.rank == 32
  assert changed.optimizer.learning_rate == 2e-3
  assert changed.model.tie_embeddings is True
  assert changed.model.dtype == "bfloat16"
  assert changed.data.path == "/a=b.txt"
  assert changed.train.steps == 1000
  assert changed.model.d_model == BASE.model.d_model


def test_fields_that_are_checked_together_change_together():
  # 5 heads do not divide the preset's width: both must come at once.
  changed = schema.override(BASE, ["model.n_heads=5", "model.d_model=40"])
  assert changed.model.head_width == 8


@pytest.mark.parametrize(
  "setting, fragments",
  [
    ("optimizer.rang=3", ["optimizer", "'rang'", "rank", "update_proj_gap"]),
    ("optimizers.rank=3", ["'optimizers'", "model", "optimizer", "mesh"]),
    ("rank=3", ["no group 'rank'"]),
    ("optimizer.rank", ["no '='"]),
    ("optimizer.rank=four", ["optimizer.rank=four", "int"]),
    ("optimizer.rank=2.5", ["optimizer.rank=2.5", "int"]),
    ("optimizer.scale=x", ["optimizer.scale=x", "float"]),
    ("model.tie_embeddings=yes", ["tie_embeddings=yes", "true or false"]),
    ("model.dtype=float8", ["float32", "bfloat16"]),
    ("optimizer.rank=0", ["optimizer.rank", "above 0", "got 0"]),
    ("optimizer.learning_rate=nan", ["optimizer.learning_rate", "nan"]),
    ("optimizer.sampled=1", ["optimizer.sampled", "between 0 and 1", "1.0"]),
    ("optimizer.warmup=1.5", ["optimizer.warmup", "[0, 1]", "1.5"]),
    ("data.holdout_every=1", ["data.holdout_every", "above 1"]),
    ("model.n_heads=5", ["model.d_model", "multiple of 10"]),
    ("model.n_kv_heads=3", ["model.n_kv_heads", "model.n_heads=4"]),
    ("optimizer.name=adam", ["adamw", "galore"]),
    ("preset=llama_60m", ["no group 'preset'"]),
    ("run.prompt=", ["run.prompt is empty"]),
  ],
)
def test_a_bad_override_says_what_would_work(setting, fragments):
  with pytest.raises(UserError) as raised:
    schema.override(BASE, [setting])
  assert all(fragment in str(raised.value) for fragment in fragments), (
    raised.value
  )


def test_unknown_names_list_the_known_ones():
  with pytest.raises(UserError, match=r"'llama'.*sotu_small.*llama_7b"):
    presets.make("llama", "galore")
  with pytest.raises(UserError, match=r"'adam'.*adamw.*galore_faithful"):
    presets.make("sotu_small", "adam")


def test_fixed_fields_are_those_that_change_the_numbers():
  flat = schema.flatten(BASE)
  fixed = schema.fixed_fields(flat)
  assert flat["optimizer.rank"] == fixed["optimizer.rank"]
  assert {"mesh.fsdp", "run.keep", "data.cache", "preset"} <= set(flat)
  assert not {"mesh.fsdp", "run.keep", "data.cache", "preset"} & set(fixed)
  assert {"model.d_model", "data.batch", "train.seed", "train.steps"} <= set(
    fixed
  )


# Exact counts of the public configurations, in millions.
SIZES = {
  "llama_60m": 58.07,
  "llama_130m": 134.11,
  "llama_350m": 367.97,
  "llama_1b": 1339.08,
  "llama_7b": 6738.42,
}


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_published_sizes(name):
  preset = presets.make(name, "galore")
  leaves = jax.tree.leaves(llama.abstract(preset.model)[1])
  count = sum(math.prod(x.shape) for x in leaves)
  assert round(count / 1e6, 2) == SIZES[name]
  assert preset.preset == name


def test_presets_have_the_published_recipe():
  recipe = {
    name: presets.make(name, "galore")
    for name in ("llama_60m", "llama_130m", "llama_350m", "llama_7b")
  }
  found = {
    name: (c.optimizer.rank, c.optimizer.update_proj_gap, c.train.steps,
           c.optimizer.learning_rate, c.optimizer.scale, c.optimizer.clip)
    for name, c in recipe.items()
  }  # fmt: skip
  assert found == {
    "llama_60m": (128, 200, 10_000, 0.01, 0.25, 0.0),
    "llama_130m": (256, 200, 20_000, 0.01, 0.25, 0.0),
    "llama_350m": (256, 200, 60_000, 0.01, 0.25, 0.0),
    "llama_7b": (1024, 500, 150_000, 0.005, 0.25, 1.0),
  }
