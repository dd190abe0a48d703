"""The default run of each task, and the settings that change it."""

import pytest

from train.common.errors import UserError
from train.config import field_help
from train.finetuning import (
  recipes,
)


def test_recipes_have_the_papers_values():
  for name, rank, rate, alpha in (
    ("cola", 4, 3e-5, 4), ("mrpc", 8, 2e-5, 2), ("stsb", 8, 3e-5, 2),
    ("sst2", 4, 1e-5, 4),
  ):  # fmt: skip
    c = recipes.make(name, "galore", rank)
    assert (c.optimizer.learning_rate, c.optimizer.scale) == (rate, alpha)
    assert (c.task.epochs, c.data.length, c.optimizer.warmup) == (30, 512, 0)
    assert c.data.batch == (32 if name == "cola" else 16)
    assert c.optimizer.clip == 0
  assert recipes.make("cola", "q_galore", 4).model.weights == "int8"
  ranks = [
    recipes.make(name, "galore").optimizer.rank for name in ("rte", "squad")
  ]
  assert ranks == [4, 16]


def test_fields_of_pretraining_do_not_exist():
  start = recipes.make("cola", "galore")
  for name, hint in (
    ("model.d_model", "The checkpoint of --from decides the model's sizes"),
    ("data.tokenizer", "The tokenizer is that of the checkpoint"),
    ("data.documents", "its fields are"),
    ("optimizer.accumulate", "set train.accumulate"),
    ("train.z_loss", "its fields are"),
    ("run.watch", "its fields are"),
  ):
    with pytest.raises(UserError, match=rf"{name}: .* has no field .*{hint}"):
      recipes.override(start, [f"{name}=1"])
    assert f"{name}=" not in field_help.summary(start)


def test_fields_that_a_flag_sets_are_refused():
  start = recipes.make("cola", "galore")
  for name in ("task.name=rte", "optimizer.name=lora", "optimizer.rank=8"):
    with pytest.raises(UserError, match="use --"):
      recipes.override(start, [name])
  with pytest.raises(UserError, match="both say how long"):
    recipes.override(start, ["train.steps=7", "task.epochs=2"])
  counted = recipes.override(start, ["train.steps=7"])
  assert (counted.train.steps, counted.task.epochs) == (7, 0)
