"""The tables as configs of the training script."""

import pytest

from train.experiments import (
  plan,
  tables,
  texts,
  training,
)
from train.methods import registry


@pytest.mark.parametrize("table", tables.TABLES.values(), ids=lambda t: t.name)
def test_every_variant_is_a_config_of_the_training_script(table, tmp_path):
  parts = texts.Parts(*(tmp_path / name for name in "abc"))
  found = plan.Plan(table, 256_000, "speeches", {})
  keys = set()
  for variant in table.variants:
    run = found.run(variant, (8e-3, 0.25), 0)
    config = training.config_of(run, parts)
    assert config.optimizer.name == variant.optimizer
    assert (config.optimizer.learning_rate, config.optimizer.matrix_lr) == (
      8e-3,
      0.25,
    )
    gap, steps = config.optimizer.update_proj_gap, config.train.steps
    bases = -(-steps // gap)
    if variant.name in ("ldadam", "every_step"):
      assert bases == steps
    elif variant.gaps < 10:
      assert bases == variant.gaps
    else:
      assert variant.gaps <= bases <= 1.3 * variant.gaps
    # No cycle of ReLoRA is cut short.
    if registry.get(variant.optimizer).restarts:
      assert config.optimizer.reset_every * variant.gaps >= 2 * steps
    keys.add(run.key)
  assert len(keys) == len(table.variants)
  names = [variant.name for variant in table.variants]
  assert len(set(names)) == len(names)


def test_the_model_has_the_documented_size():
  run = plan.Plan(tables.METHODS, 10**6, "speeches", {}).missing()[0]
  model = training.config_of(run, texts.Parts(*[None] * 3)).model  # type: ignore
  d, ff = model.d_model, model.d_ff
  assert 2e6 <= model.n_layers * (4 * d * d + 3 * d * ff) <= 10e6 and d >= 192
