"""The registry of methods, and the defaults that its records hold."""

import dataclasses

import jax.numpy as jnp
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
    (
      "muon",
      ["optimizer.residual=normalized"],
      "GaLore.*--optimizer muon",
    ),
    ("contrib_galore", ["optimizer.residual=factored"], "=contrib.*none of"),
    ("fira", ["optimizer.residual_factor=2"], r"residual_factor=2.0 has no"),
    ("adamw", ["optimizer.burst=4"], "burst=4 has no meaning .*none of GaLore"),
    ("ldadam", ["optimizer.moments=keep"], "rule of its own; leave it at rot"),
    ("ldadam", ["optimizer.random_from=9"], "follow the momentum"),
    ("gum", ["optimizer.moments=reset"], "begins with each draw"),
    ("galore", ["optimizer.burst=-1"], "burst"),
    (
      "galore",
      ["optimizer.residual=none", "optimizer.residual_growth=1.5"],
      "no meaning",
    ),
    (
      "galore",
      ["optimizer.residual=factored", "optimizer.residual_growth=0.5"],
      "must be 1 or more, or 0",
    ),
    (
      "galore",
      ["optimizer.burst=4", "optimizer.projector=svd"],
      "projector=svd",
    ),
    ("galore", ["optimizer.burst=4", "optimizer.refresh=adaptive"], "adaptive"),
  ],
)
def test_what_a_method_cannot_do_is_refused(name, settings, words):
  with pytest.raises(UserError, match=words):
    schema.override(presets.make("sotu_small", name), settings)


@pytest.mark.parametrize(
  "name", ["fira", "apollo", "apollo_mini", "q_apollo_mini", "gum", "ldadam"]
)
def test_methods_with_a_residual_of_their_own_refuse_the_option(name):
  with pytest.raises(UserError, match=rf"residual=normalized .*name={name}"):
    schema.override(
      presets.make("sotu_small", name), ["optimizer.residual=normalized"]
    )


def test_the_name_of_a_method_is_also_that_of_its_moments():
  config = presets.make("sotu_small", "ldadam")
  schema.override(config, ["optimizer.moments=ldadam"])


@pytest.mark.parametrize(
  ("name", "why"),
  [
    ("q_galore", "take galore_8bit"),
    ("golore", "random late"),
    ("apollo", "bases are random"),
    ("gum", "refresh of one step"),
    ("ldadam", "change at every step"),
    ("galore_faithful", "are exact"),
  ],
)
def test_methods_that_have_no_bursts_refuse_the_option(name, why):
  # Without the residual that the preset of some of them has.
  plain = schema.override(
    presets.make("sotu_small", name), ["optimizer.residual=none"]
  )
  with pytest.raises(UserError, match=f"burst=4 .*name={name}, .*{why}"):
    schema.override(plain, ["optimizer.burst=4"])


@pytest.mark.parametrize("name", ["galore", "galore_8bit", "q_galore", "sumo"])
@pytest.mark.parametrize("residual", ["normalized", "factored"])
def test_the_residual_reaches_the_transformation(name, residual):
  schedule = optax.constant_schedule(1e-3)
  params = {"layers": {"kernel": jnp.zeros((8, 12))}, "norm": jnp.zeros(8)}
  settings = {"name": name, "rank": 2}
  make = lambda **more: registry.get(name).make(
    OptimizerConfig(**settings, **more), schedule, None
  )
  kept = optax.tree.get(
    make(residual=residual, residual_factor=0.5).init(params), "recovery"
  )
  state = kept["layers/kernel"]
  assert state.columns.shape == (12,)
  assert (state.rows is None) == (residual == "normalized")
  assert optax.tree.get(make().init(params), "recovery") is None
