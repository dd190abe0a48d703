"""train.bench: figures of tiny programs, records and the generated page.

No test asserts a time, which depends on the machine's load.
"""

import argparse
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.bench import __main__ as command
from train.bench import (
  chips,
  compiled_step,
  cost,
  model,
  record,
  refresh,
  report,
  shard,
  step,
  torch_peers,
  trees,
)
from train.bench import compile as compile_bench
from train.common.errors import UserError
from train.measure import gradients
from train.measure import page as page_lib

TINY_STEP = ["step", "--trees=tiny", "--layouts=unrolled", "--gap=4"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
  """A folder with records of tiny benchmarks, made by the command itself."""
  out = tmp_path_factory.mktemp("bench")
  fast = pytest.MonkeyPatch()
  chosen = ("optax.adamw", "contrib.galore", trees.OURS)
  all_of = trees.optimizers
  fast.setattr(
    trees, "optimizers", lambda *args: {k: all_of(*args)[k] for k in chosen}
  )
  # `step` compiles ours already.
  fast.setattr(compile_bench, "NAMES", ("optax.adamw", "contrib.galore"))
  try:
    assert command.main([*TINY_STEP, "--peer-steps=2", f"--out={out}"]) == 0
    arguments = ["compile", "--trees=tiny", "--layouts=stacked", "--rounds=1"]
    assert command.main([*arguments, f"--out={out}"]) == 0
  finally:
    fast.undo()
  return out


def test_a_record_names_its_origin(measured):
  result = record.load(measured / "step-tiny-unrolled.json")
  assert result["command"] == (
    "python -m train.bench step --gap=4 --peer-steps=2 --trees tiny"
    " --layouts unrolled --results in_place"
  )
  assert result["versions"]["jax"] == jax.__version__
  commit = result["versions"].get("commit", "0" * 12)  # none outside of git
  assert len(commit.removesuffix("+")) == 12
  assert result["machine"]["cores"] >= 1
  assert str(measured) not in str(result)  # nor any other path of this machine
  arguments = ["chips", "--keep", "a", "--seq", "9", "--python=b"]
  assert record.without(arguments, record.LOCAL_OPTIONS) == [
    "chips",
    "--seq",
    "9",
  ]


def test_step_figures(measured):
  results = record.load(measured / "step-tiny-unrolled.json")["results"]
  rows = results["rows"]
  assert len(rows[trees.OURS]["times"]) == results["gap"] == 4
  assert rows["contrib.galore"]["steps"] == 2
  # Refreshing everything at once, its worst step is its first.
  assert rows["contrib.galore"]["worst"] == rows["contrib.galore"]["first"]
  size = trees.SIZES["tiny"]
  leaves = jax.tree.leaves(trees.shapes(size, False), is_leaf=trees.is_shape)
  weights = sum(map(math.prod, leaves))
  adamw = rows["optax.adamw"]["state_bytes"]
  assert 8 * weights < adamw < 8 * weights + 20
  assert rows[trees.OURS]["state_bytes"] < adamw
  found = step.ratios(results)
  assert found["optax.adamw"]["steady / adamw"] == 1
  assert found["contrib.galore"]["build / contrib"] == 1


def test_a_step_in_place_copies_nothing():
  """With results in another sequence it does."""
  tree = trees.shapes(trees.SIZES["tiny"], False)
  leaves = jax.tree.leaves(tree, is_leaf=trees.is_shape)
  weights = 4 * sum(map(math.prod, leaves))
  adamw = trees.optimizers(8, 4)["optax.adamw"]
  assert compiled_step.compile_step(adamw, tree).temporaries < weights / 10
  swapped = compiled_step.compile_step(adamw, tree, swapped=True)
  assert swapped.temporaries >= 2 * weights


def test_amortised_steps_add_up():
  """Synchronous refreshes are in the first step, others among the steps."""
  adamw = {i: 0.5 for i in range(10)}
  synchronous = step._figures(
    "contrib.galore", 11.0, {0: 1.0, 5: 1.0}, adamw, 10
  )
  assert synchronous["amortised"] == (9 * 1.0 + 11.0) / 10
  assert synchronous["amortised_of_adamw"] == 2 * synchronous["amortised"]
  times = dict(enumerate([1.0, 1.0, 2.0, 1.0]))
  staggered = step._figures(trees.OURS, 3.0, times, adamw, gap=4)
  assert staggered["amortised_of_adamw"] == 2 * staggered["amortised"]
  found = [staggered[x] for x in ("amortised", "worst", "steady")]
  assert found == [1.25, 2, 1]


def test_the_page_is_rendered_from_records(measured, tmp_path):
  page = tmp_path / "page.md"
  page.write_text(
    "By hand.\n\n<!-- step: begin -->\nold\n<!-- step: end -->\n\nMore.\n"
    "<!-- chips: begin -->\n<!-- chips: end -->\n",
    encoding="utf-8",
  )
  arguments = ["report", f"--out={measured}", f"--page={page}"]
  assert command.main(arguments) == 0
  first = page.read_text(encoding="utf-8")
  assert first.startswith("By hand.\n\n<!-- step: begin -->\n")
  assert "old" not in first
  assert "LLaMA-TINY, unrolled, rank 8, T = 4" in first
  assert "| optax.adamw | 1.00 | 1.00 |" in first
  assert "Not measured yet: `python -m train.bench chips`." in first
  assert command.main(arguments) == 0
  assert page.read_text(encoding="utf-8") == first


def test_figures_are_drawn(measured):
  assert (measured / "step-tiny-unrolled.png").stat().st_size > 5000


def test_wrong_pages_and_records(tmp_path, capsys):
  page = tmp_path / "page.md"
  page.write_text("<!-- step: begin -->\n<!-- step: end -->\n", "utf-8")
  (tmp_path / "step-60m-stacked.json").write_text('{"schema": 0}', "utf-8")
  arguments = ["report", f"--out={tmp_path}", f"--page={page}"]
  assert command.main(arguments) == 2
  assert "schema 0, expected 1" in capsys.readouterr().err
  page.write_text("nothing here", "utf-8")
  assert command.main(arguments) == 2
  assert "no generated section" in capsys.readouterr().err
  assert command.main(["all", "--only=steps"]) == 2
  assert "steps unknown" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["step", "--trees=61m"], "'61m' is unknown; choose from tiny, 60m"),
    (["compile", "--layouts=flat"], "'flat' is unknown"),
    (["shard", "--meshes=both"], "'both' is unknown; choose from auto"),
    (["refresh", "--sizes=512"], "write m x n x rank"),
    (["refresh", "--sizes=64x32x8"], "needs m <= n"),
    (["cost", "--largest=64"], "use at least 512"),
  ],
)
def test_wrong_options(arguments, message, capsys):
  assert command.main(arguments) == 2
  assert message in capsys.readouterr().err


def test_missing_peers_are_named(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert command.main([*TINY_STEP, "--torch"]) == 2
  error = capsys.readouterr().err
  assert "torch and galore_torch not installed" in error
  assert ".[train,bench]" in error


def test_torch_peers_have_the_expected_state():
  if missing := [
    x for x in torch_peers.MODULES if importlib.util.find_spec(x) is None
  ]:
    pytest.skip(f"needs {' and '.join(missing)} (extra bench)")
  grads = {"mlp": {"up": jnp.ones((2, 12, 20))}, "norm": jnp.ones(12)}
  peers = torch_peers.start(grads, rank=4, gap=2)
  for peer in peers.values():
    peer.call()
  low = 2 * (12 * 4 + 2 * 4 * 20) + 2 * 12
  assert peers["galore-torch"].state_bytes() == 4 * low
  full = 2 * (2 * 12 * 20 + 12)
  assert 0 <= peers["torch AdamW"].state_bytes() - 4 * full <= 3 * 4


def test_quick_changes_only_defaults():
  flags = command.parse(["step", "--quick", "--gap=6"])
  assert (flags.trees, flags.gap) == ("60m", 6)
  assert command.parse(["step"]).trees == "60m,130m"


def test_energies_of_methods():
  made = gradients.Synthetic(24, 40)
  g, old = made.gradient(0.5), made.stale_basis(6)
  found = refresh.energies(g, old, refresh._best_energy(0.5, 24, 6))
  by_svd = refresh.energies(g, old)
  for name in refresh.STARTS:
    assert abs(found[name] - by_svd[name]) < 1e-4
    assert found[name] <= 1 + 1e-5
  for start in ("cold", "warm"):
    shares = [found[f"{start} {k}"] for k in refresh.ITERATIONS]
    assert shares == sorted(shares)
  assert found["warm 1"] > found["cold 1"] > found["random"]
  assert found["orthogonality"] < 1e-5
  # The long side of a tall gradient keeps the same energy.
  tall = refresh.energies(np.ascontiguousarray(g.T), old)
  assert abs(tall["warm 2"] - by_svd["warm 2"]) < 1e-4


def test_recorded_gradients_are_reused(tmp_path, monkeypatch):
  made = gradients.Synthetic(8, 12)
  stack = np.stack([made.gradient(0.5)] * 2)
  found = {
    f"{time}.{which}/layers/up": stack
    for time in ("early", "late")
    for which in ("old", "new")
  }
  monkeypatch.setattr(gradients, "record", lambda *_: found)
  path, when = tmp_path / "new" / "g.npz", gradients.Steps((1, 2), (3, 4))
  gradients.load_or_record(path, "sotu_small", [], when)
  monkeypatch.setattr(gradients, "record", None)
  again = gradients.load_or_record(path, "sotu_small", [], when)
  rows = refresh._recorded(again, when)
  assert [x["name"] for x in rows] == [
    "early (step 2), 8 x 12",
    "late (step 4), 8 x 12",
  ]
  assert rows[0]["matrices"] == 2
  # The gradient did not change, so its old basis is the best one.
  assert rows[0]["least"]["stale"] > 0.9999
  path.write_text("no archive", "utf-8")
  with pytest.raises(UserError, match="record it again"):
    gradients.load_or_record(path, "sotu_small", [], when)


def test_the_cost_model_counts_what_the_compiler_counts():
  site = model.Site(16, 24, 4, layers=2)
  assert site.project()[0] == 2 * 2 * 16 * 24 * 4
  _, counted = cost._runs(site)
  assert counted["project"] == site.project()[0]
  assert counted["lift"] == site.project()[0]


def test_share_of_the_gradient():
  size = trees.Size(dim=64, hidden=96, layers=2, vocab=0, rank=16)
  found = model.flops_per_step(size, 10**12, tokens=100)
  # 4 m n r over 6 m n tokens for every matrix.
  assert abs(found["share"] - 4 * 16 / (6 * 100)) < 1e-6
  more = model.flops_per_step(size, 50, tokens=100)
  assert more["refresh"] > 0
  assert more["project_and_lift"] == found["project_and_lift"]


def test_limits_bound_a_part():
  best = {"flops": 100.0, "bytes": 10.0}
  assert model.least_seconds({"flops": 200, "bytes": 10}, best) == 2.0
  assert model.least_seconds({"flops": 100, "bytes": 30}, best) == 3.0


@pytest.fixture(scope="module")
def sharded():
  """Programs of a small model on eight devices."""
  patch = pytest.MonkeyPatch()
  patch.setattr(shard, "SIZE", trees.Size(64, 160, 1, 32, 24))
  flags = argparse.Namespace(
    layouts="fsdp",
    meshes="auto,explicit",
    optimizers="optax.adamw;contrib.galore",
  )
  try:
    return shard.measure(flags)
  finally:
    patch.undo()


def test_sharded_figures(sharded):
  by_name = {(x["mesh"], x["optimizer"]): x for x in sharded["programs"]}
  adamw = by_name["auto", "optax.adamw"]
  assert adamw["gathered"] == {}
  assert abs(8 * adamw["state_bytes"] / adamw["whole_bytes"] - 1) < 0.1
  contrib = by_name["auto", "contrib.galore"]
  assert contrib["gathered"]["G"] > 0
  assert "ShardingTypeError" in by_name["explicit", "contrib.galore"]["error"]
  assert "fails: ShardingTypeError" in shard.tables(sharded)


def test_layouts_shard_the_named_axes():
  mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
  tree = trees.shapes(trees.SIZES["tiny"], stacked=True)
  layout = shard.Layout({}, "fsdp", "tensor", None, True)
  found = shard.shardings(layout, tree, mesh)
  layers = found["layers"]
  assert layers["attn"]["q"].spec == jax.P(None, "fsdp", "tensor")
  assert layers["mlp"]["down"].spec == jax.P(None, "tensor", "fsdp")
  assert found["embed"].spec == jax.P("tensor", "fsdp")
  assert found["norm"].spec == jax.P(None)


def test_chips_are_compiled_once(tmp_path, monkeypatch):
  """Kept results are reused; the others come from `train.memory`."""
  parts = dict.fromkeys(chips.PARTS, 2**30)
  figures = {
    "preset": "llama_7b",
    "target": "tpu:v6e:2x2",
    "layerwise": False,
    "seq": 2048,
    "batch": 4,
    "devices": 4,
    "temp_bytes": None,
    "peak_bytes": 5 * 2**30,
    "room_bytes": 10 * 2**30,
    "components": parts,
    "collectives": {
      "every_step": {"all-gather": {"count": 3, "bytes": 2**30}},
      "when_due": {},
    },
  }
  commands = []

  def run(command, **_):
    commands.append(command)
    layerwise = "--layerwise" in command
    out = json.dumps(figures | {"method": "galore", "layerwise": layerwise})
    return argparse.Namespace(returncode=0, stdout=out + "\n", stderr="")

  monkeypatch.setattr(chips.subprocess, "run", run)
  result = tmp_path / "v6e:2x2-adamw.json"
  result.write_text(json.dumps(figures | {"method": "adamw"}), "utf-8")
  arguments = ["chips", "--targets=tpu:v6e:2x2", f"--keep={tmp_path}"]
  assert command.main([*arguments, f"--out={tmp_path}"]) == 0
  assert len(commands) == 2
  assert "--batch=4" in commands[0]
  assert ["--layerwise" in arguments for arguments in commands] == [False, True]
  results = record.load(tmp_path / "chips.json")["results"]
  table = chips.tables(results)
  assert "| v6e:2x2, adamw | 1.00 | 1.00 | 1.00 | - | 5.00 | 50% |" in table
  assert "| v6e:2x2, galore, layerwise | 1.00 |" in table
  assert "3, 1.00 GiB" in table
  assert (tmp_path / "chips.png").stat().st_size > 5000


def test_messages_of_the_tpu_compiler_are_passed_on(monkeypatch, capsys):
  run = lambda *_, **__: argparse.Namespace(
    returncode=2, stdout="", stderr="error: needs the compiler\n"
  )
  monkeypatch.setattr(chips.subprocess, "run", run)
  assert command.main(["chips"]) == 2
  assert "needs the compiler" in capsys.readouterr().err
  assert command.main(["chips", "--targets=tpu:v5e"]) == 2
  assert "name the topology" in capsys.readouterr().err
  assert command.main(["chips", "--methods=adamw,galore+fast"]) == 2
  assert "unknown suffix 'fast'" in capsys.readouterr().err


def test_all_keeps_the_records_of_what_failed(tmp_path, monkeypatch, capsys):
  commands = []

  def run(arguments, **_):
    commands.append(arguments[3:])
    return argparse.Namespace(returncode=int(arguments[3] == "chips"))

  monkeypatch.setattr(command.subprocess, "run", run)
  page = tmp_path / "page.md"
  page.write_text("<!-- step: begin -->\n<!-- step: end -->\n", "utf-8")
  arguments = [
    "all",
    f"--out={tmp_path}",
    f"--page={page}",
    "--only=step,chips",
  ]
  arguments += ["--single-threaded", "--torch"]
  assert command.main([*arguments, "--tpu-python=py"]) == 1
  single = [f"--out={tmp_path}", "--single-threaded"]
  assert commands == [
    ["step", *single, "--torch"],
    ["chips", *single, "--python=py"],
  ]
  assert "their old records are kept: chips" in capsys.readouterr().out
  monkeypatch.setattr(command.importlib.util, "find_spec", lambda _: None)
  assert command.main(arguments) == 0
  assert "chips skipped" in capsys.readouterr().out


def test_the_page_has_a_section_of_every_benchmark_as_generated():
  text = report.PAGE.read_text(encoding="utf-8")
  for name in command.BENCHMARKS:
    assert f"<!-- {name}: begin -->" in text
  render = lambda name: report.section(name, record.FOLDER)
  new, count = page_lib.fill(text, render)
  assert count >= len(command.BENCHMARKS)
  assert new == text
