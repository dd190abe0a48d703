"""The registry of methods, and the defaults that its records hold."""

import dataclasses

import optax
import pytest

from train.common.errors import UserError
from train.config import presets, schema
from train.methods import registry
from train.methods.options import OptimizerConfig


def test_an_unknown_method_is_an_error_with_all_names():
  with pytest.raises(UserError, match=r"optimizer.name=adan .*galore, "):
    registry.get("adan")
  with pytest.raises(UserError, match=r"optimizer.name=adan .*one of adamw"):
    schema.override(
      presets.make("sotu_small", "galore"), ["optimizer.name=adan"]
    )


@pytest.mark.parametrize("name", registry.METHODS)
def test_records_agree_with_themselves(name):
  method = registry.get(name)
  fields = {f.name for f in dataclasses.fields(OptimizerConfig)}
  for options in (method.small, method.options, method.fine_tuning):
    assert options.keys() <= fields
  assert not (method.projects and method.factors)
  assert method.projects or not (method.accumulates or method.unwatchable)
  assert bool(method.restarts) <= bool(method.factors)


@pytest.mark.parametrize("name", registry.METHODS)
def test_every_method_makes_a_transformation(name):
  schedule = optax.constant_schedule(1e-3)
  tx = registry.get(name).make(OptimizerConfig(name=name), schedule, None)
  assert callable(tx.init) and callable(tx.update)


def test_the_help_has_a_line_for_every_method():
  lines = registry.summary().splitlines()
  assert len(lines) == len(registry.METHODS)
  assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
  ("name", "settings", "words"),
  [
    ("gum", ["train.layerwise=true"], "use sumo"),
    ("lora", ["train.layerwise=true"], "use a GaLore method"),
    ("lora", ["model.weights=int8"], "qlora"),
    ("galore_lion", ["optimizer.moments=ldadam"], "use galore or fira"),
  ],
)
def test_what_a_method_cannot_do_is_refused(name, settings, words):
  with pytest.raises(UserError, match=words):
    schema.override(presets.make("sotu_small", name), settings)
