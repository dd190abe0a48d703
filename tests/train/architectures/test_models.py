"""Every architecture: what is projected, and a training run of a few steps."""

import dataclasses

import jax
import numpy as np
import pytest

import galore_optax as go
from train.architectures import catalog, loop, optimizers, views

# Matrices that GaLore projects, by path, as `describe` prints them.
PROJECTED = {
  "vit": {
    "blocks/0/attention/key/kernel": "(16, 16)",
    "blocks/0/attention/out/kernel": "(16, 16)",
    "blocks/0/attention/query/kernel": "(16, 16)",
    "blocks/0/attention/value/kernel": "(16, 16)",
    "blocks/0/down/kernel": "(64, 16)",
    "blocks/0/up/kernel": "(16, 64)",
  },
  "cnn": {"conv_1/kernel": "9 x (8, 16)"},
  "gru": {"gru_0/w_h": "(16, 48)", "gru_0/w_i": "(16, 48)"},
  "moe": {
    **{f"layers/attention/{x}/kernel": "2 x (16, 16)" for x in "kqvo"},
    "layers/experts/down": "4 x (16, 16)",
    "layers/experts/gate": "4 x (16, 16)",
    "layers/experts/up": "4 x (16, 16)",
  },
  "ssm": {
    "blocks/0/into/weight": "(32, 16)",
    "blocks/0/out_of/weight": "(16, 16)",
    "blocks/0/select/weight": "(16, 16)",
    "blocks/0/step_size/weight": "(16, 8)",
  },
  "diffusion": {
    "time/kernel": "(32, 64)",
    "first/condition/kernel": "(64, 8)",
    "down/condition/kernel": "(64, 16)",
    "middle/0/condition/kernel": "(64, 16)",
    "middle/1/condition/kernel": "(64, 16)",
    "up/condition/kernel": "(64, 8)",
    "down/conv/kernel": "9 x (8, 16)",
    "first/conv/kernel": "9 x (4, 8)",
    "middle/0/conv/kernel": "9 x (16, 16)",
    "middle/1/conv/kernel": "9 x (16, 16)",
    "up/conv/kernel": "9 x (24, 8)",
  },
}
TINY = {
  "width": 16,
  "inner": 16,
  "channels": 8,
  "expert_width": 16,
  "experts": 2,
  "active": 1,
  "depth": 1,
  "heads": 2,
  "patch": 14,
  "length": 8,
  "batch": 16,
  "steps": 12,
  "gap": 2,
}


def tiny(name):
  """The entry and its smallest config; skips if its library is missing."""
  entry = catalog.ENTRIES[name]
  if not entry.installed():
    pytest.skip(f"{entry.library} is not installed: install the extra recipes")
  config = entry.module().Config()
  names = {field.name for field in dataclasses.fields(config)}
  values = {key: value for key, value in TINY.items() if key in names}
  if name in ("cnn", "moe"):
    values["depth"] = 2
  return entry, dataclasses.replace(config, **values)


@pytest.mark.parametrize("name", catalog.ENTRIES)
def test_rules_project_the_matrices(name):
  entry, config = tiny(name)
  trainer = loop.build(entry, config, loop.Rates("galore", 1e-2, 1.0))
  params = jax.eval_shape(lambda: trainer.params(trainer.start(0)))
  options = optimizers.Options(6, config.rank, 2, entry.module().RULES)
  plan = go.describe(optimizers._galore(1.0, 1.0, options), params)
  assert {row.path: row.matrix for row in plan.rows if row.rank} == PROJECTED[
    name
  ]
  leaves = jax.tree.leaves(optimizers.matrices(params, options))
  assert leaves == [row.path in PROJECTED[name] for row in plan.rows]


@pytest.mark.parametrize(
  ("name", "method"),
  [
    pytest.param(name, method, marks=pytest.mark.slow)
    if (name, method) != ("cnn", "galore")
    else (name, method)
    for name in catalog.ENTRIES
    for method in ("galore", "adamw")
  ],
)
def test_an_architecture_trains(name, method):
  entry, config = tiny(name)
  made = loop.run(entry, config, loop.Rates(method, 1e-2, 1.0), 0)
  assert made.record["status"] == "done"
  start, test = made.trainer.start(0), entry.prepare(config).test
  before = loop.mean_scores(made.trainer, start, test)["loss"]
  assert made.record["test_loss"] < before - 0.02
  bases = go.find_bases(made.trainer.opt_state(made.state))
  assert bool(bases) == (method == "galore")


@pytest.mark.slow
def test_samples_are_images():
  entry, config = tiny("diffusion")
  config = dataclasses.replace(config, steps=1)
  made = loop.run(entry, config, loop.Rates("galore", 1e-2, 1.0), 0)
  images = made.trainer.sample(made.state, 0)
  assert images.shape == (100, 28, 28)
  assert 0 <= images.min() < images.max() <= 1
  assert not np.array_equal(images, made.trainer.sample(made.state, 1))


@pytest.mark.slow
def test_ways_to_read_a_kernel_are_compared(monkeypatch):
  """Exact bases on more sides keep less, in a smaller state."""
  monkeypatch.setattr(views, "SHARES", (0.25,))
  monkeypatch.setattr(views, "TIMES", 1)
  lines = views.table(dataclasses.replace(tiny("cnn")[1], steps=2))
  cells = [line.strip("| ").split(" | ") for line in lines.splitlines()[2:]]
  size = {x[0]: int(x[2].replace(",", "")) for x in cells}
  kept = {x[0]: float(x[4].rstrip("%")) for x in cells}
  nine, one, both, tensor = views.VIEWS
  # The kernel is (3, 3, 8, 16), so that ranks are 2 and 4.
  assert size[one] == 4 * (16 * 4 + 2 * 72 * 4)
  assert size[tensor] == 4 * (8 * 2 + 16 * 4 + 2 * 9 * 2 * 4)
  assert size[tensor] < size[both] < size[one]
  assert size[nine] == 4 * 9 * (8 * 2 + 2 * 2 * 16)
  assert 20 < kept[tensor] < kept[one] == kept[both] < 100
