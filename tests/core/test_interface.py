"""The arguments of `galore` and its recipes: the same, and none of the old."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax import Adaptive, Refresh, galore
from galore_optax.optimizers.options import GaLoreOptions
from galore_optax.subspace import refresh_settings

RECIPES = {
  name: getattr(galore_optax, name)
  for name in (
    "apollo_adamw",
    "apollo_mini_adamw",
    "galore_adafactor",
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_lion",
    "galore_sgd",
    "gum",
    "ldadam",
    "q_galore_adamw_8bit",
    "sumo",
  )
}
# What the recipes' docstrings say of defaults.
DEFAULTS = {
  "apollo_adamw": {
    "rank": 256,
    "scale": 1.0,
    "residual": "apollo",
    "refresh": Refresh(finder="random", moments="keep"),
  },
  "apollo_mini_adamw": {
    "rank": 1,
    "scale": 128.0,
    "residual": "apollo_mini",
    "refresh": Refresh(finder="random", moments="keep"),
  },
  "gum": {"scale": 0.2, "refresh": Refresh(policy="synchronous")},
  "ldadam": {
    "update_proj_gap": 1,
    "scale": 1.0,
    "refresh": Refresh(policy="synchronous", iterations=1, moments="ldadam"),
  },
  "q_galore_adamw_8bit": {
    "basis_dtype": "int4",
    "refresh": Refresh(policy="adaptive"),
  },
  "sumo": {"scale": 0.2},
}
OPTIONS = inspect.signature(galore).parameters
PARAMS = {"w": jnp.ones((2, 16, 24)), "bias": jnp.ones(24)}


def test_every_recipe_of_the_library_is_tested():
  takes_rank = [
    name
    for name in galore_optax.__all__
    if inspect.isfunction(make := getattr(galore_optax, name))
    and "rank" in inspect.signature(make).parameters
  ]
  assert sorted(takes_rank) == sorted([*RECIPES, "galore"])


def test_recipes_share_all_options_but_how_params_are_read():
  keyword_only = [
    name for name, x in OPTIONS.items() if x.kind is x.KEYWORD_ONLY
  ]
  assert keyword_only == [*GaLoreOptions.__annotations__, "params_mode"]


@pytest.mark.parametrize("name", RECIPES)
def test_signatures_are_those_of_galore(name):
  parameters = inspect.signature(RECIPES[name]).parameters
  assert next(iter(parameters)) == "learning_rate"
  for option in GaLoreOptions.__annotations__:
    found, wanted = parameters[option], OPTIONS[option]
    assert found.kind is inspect.Parameter.KEYWORD_ONLY
    assert found.annotation == wanted.annotation
    default = DEFAULTS.get(name, {}).get(option, wanted.default)
    assert found.default == default, option
  assert not any(x.kind is x.VAR_KEYWORD for x in parameters.values())


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_reach_galore_with_their_options(name):
  rules = [("bias", None), ("w", galore_optax.Projection(rank=3))]
  tx = RECIPES[name](1e-2, rules=rules, state_dtype="bfloat16", seed=3)
  rows = galore_optax.describe(tx, PARAMS).rows
  ranks = {row.path: row.rank for row in rows}
  assert ranks == {"bias": None, "w": 3}


@pytest.mark.parametrize("name", [*RECIPES, "galore"])
def test_an_unknown_argument_is_refused_by_name(name):
  make = RECIPES.get(name, galore)
  with pytest.raises(TypeError, match=f"{name}.*unexpected.*'ranks'"):
    make(1e-2, ranks=4)


@pytest.mark.parametrize("name", [*RECIPES, "galore"])
@pytest.mark.parametrize(
  ("old", "new"),
  [
    ({"projector": "svd"}, "refresh=Refresh(finder='svd')"),
    ({"moments": "keep"}, "refresh=Refresh(moments='keep')"),
    ({"iterations": 3}, "refresh=Refresh(iterations=3)"),
    ({"null_tolerance": 0.0}, "refresh=Refresh(null_tolerance=0.0)"),
    ({"random_from": 9}, "refresh=Refresh(random_from=9)"),
    ({"share_refresh": False}, "refresh=Refresh(share=False)"),
    ({"recovery": "fira"}, "residual='fira'"),
    (
      {"refresh": "synchronous", "projector": "svd", "recovery": "apollo"},
      "refresh=Refresh(policy='synchronous', finder='svd'), residual='apollo'",
    ),
  ],
)
def test_old_spellings_show_the_new_one(name, old, new):
  make = RECIPES.get(name, galore)
  with pytest.raises(TypeError) as error:
    make(1e-2, **old)
  assert f"Write {name}(..., {new})" in str(error.value)
  assert not set(old) - {"refresh"} & set(inspect.signature(make).parameters)


def test_the_new_spelling_of_an_adaptive_rule_can_be_pasted():
  with pytest.raises(TypeError) as error:
    galore(optax.adam(1.0), refresh="adaptive", adaptive=Adaptive(window=2))
  text = str(error.value)
  shown = text[text.index("Refresh(") : text.rindex("), with")]
  rule = Adaptive(window=2)
  assert eval(shown) == Refresh(policy="adaptive", adaptive=rule)


def test_a_string_is_a_policy():
  for policy in refresh_settings.POLICIES:
    short = refresh_settings.complete(policy)
    assert short == refresh_settings.complete(Refresh(policy=policy))


def test_a_recipe_fills_in_its_own_defaults():
  params = {"w": jnp.zeros((16, 24))}
  tx = galore_optax.q_galore_adamw_8bit(
    1e-2, rank=2, refresh=Refresh(finder="svd")
  )
  assert tx.init(params).schedule is not None
  tx = galore_optax.q_galore_adamw_8bit(1e-2, rank=2, refresh="staggered")
  assert tx.init(params).schedule is None
  tx = galore_optax.apollo_adamw(1e-2, rank=2, refresh="synchronous")
  assert galore_optax.state_bytes(tx.init(params).projector) == 4  # a seed


@pytest.mark.parametrize(
  ("name", "option"),
  [
    ("apollo_adamw", {"residual": "fira"}),
    ("apollo_mini_adamw", {"accumulation_steps": 2}),
    ("gum", {"residual": "fira"}),
    ("gum", {"accumulation_steps": 4}),
    ("ldadam", {"residual": "fira"}),
    ("ldadam", {"accumulation_steps": 4}),
    ("q_galore_adamw_8bit", {"faithful": True}),
    ("sumo", {"faithful": True}),
  ],
)
def test_options_without_meaning_are_refused_with_the_reason(name, option):
  ((key, value),) = option.items()
  with pytest.raises(ValueError, match=f"`{key}={value!r}` has no meaning for"):
    RECIPES[name](1e-2, **option)
  RECIPES[name](1e-2, accumulation_steps=1)


def test_hyperparameters_are_injected_beside_a_refresh():
  """Numbers vary, the `Refresh` is left alone."""
  params = {"w": jnp.ones((16, 24))}
  refresh = Refresh(iterations=3, random_from=2, null_tolerance=1e-5)
  options = {"rank": 2, "update_proj_gap": 2, "refresh": refresh}
  tx = optax.inject_hyperparams(galore_optax.galore_adamw)(1e-2, **options)
  plain = galore_optax.galore_adamw(1e-2, **options)
  state, wanted_state = tx.init(params), plain.init(params)
  assert "refresh" not in state.hyperparams
  assert {"learning_rate", "update_proj_gap", "scale"} <= set(state.hyperparams)
  for seed in range(3):
    grad = np.random.default_rng(seed).normal(size=(16, 24))
    grads = {"w": jnp.asarray(grad, jnp.float32)}
    found, state = jax.jit(tx.update)(grads, state, params)
    wanted, wanted_state = jax.jit(plain.update)(grads, wanted_state, params)
    np.testing.assert_allclose(found["w"], wanted["w"], atol=1e-6)


def test_numbers_of_a_refresh_may_be_traced():
  def make(learning_rate, iterations, random_from, null_tolerance):
    refresh = Refresh(
      iterations=iterations,
      random_from=random_from,
      null_tolerance=null_tolerance,
    )
    return galore(optax.adam(learning_rate), rank=2, refresh=refresh)

  params = {"w": jnp.ones((16, 24))}
  tx = optax.inject_hyperparams(make)(1e-2, 2, 5, lambda step: 1e-6 * step)
  updates, state = jax.jit(tx.update)(params, tx.init(params), params)
  assert jnp.isfinite(updates["w"]).all() and updates["w"].any()
  assert {"iterations", "random_from"} <= set(state.hyperparams)
