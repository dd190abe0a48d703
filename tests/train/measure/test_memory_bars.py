import json
import pathlib
import re

import pytest

from train import memory
from train.measure import memory_bars

ROOT = pathlib.Path(__file__).parents[3]
PICTURED = ROOT / "docs/results/memory/llama_7b.json"


def bar(peak=8.0, **sizes):
  components = dict.fromkeys(memory_bars.COMPONENTS, 0) | {
    name: int(size * 2**30) for name, size in sizes.items()
  }
  figures = {"components": components, "peak_bytes": int(peak * 2**30)}
  return {
    "label": "AdamW",
    "flags": "--method adamw --target gpu:a",
    "figures": figures,
  }


def content(**changes):
  return {
    "title": "a model",
    "caption": "GiB",
    "limits": [{"gib": 6.0, "label": "a card"}],
    "bars": [bar(weights=4.0, moments=4.0)],
  } | changes


def test_components_are_those_that_train_memory_reports():
  assert set(memory_bars.COMPONENTS) == set(memory.PARTS)


def test_the_committed_figures_add_up_and_are_of_their_flags():
  bars = memory_bars.read(PICTURED)["bars"]
  assert len(bars) == 5
  for entry in bars:
    sizes = memory_bars.gib(entry)
    parts = sum(sizes[name] for name in memory_bars.COMPONENTS)
    assert parts == pytest.approx(sizes["peak"], rel=0.01)
    flags = memory.parse(memory_bars.command(entry)[3:])
    figures = entry["figures"]
    assert flags.method == figures["method"]
    assert flags.layerwise == figures["layerwise"]
    assert (flags.seq, flags.target) == (figures["seq"], figures["target"])
    assert {"jax", "jaxlib", "optax"} <= set(entry["versions"])


def test_the_command_draws_and_prints_the_figures(tmp_path, capsys):
  source, out = tmp_path / "bars.json", tmp_path / "bars.png"
  source.write_text(json.dumps(content()), encoding="utf-8")
  assert memory_bars.main([str(source), "--out", str(out)]) == 0
  assert out.read_bytes().startswith(b"\x89PNG")
  printed = capsys.readouterr().out
  assert re.search(
    r"AdamW +4\.00 +0\.00 +4\.00 +0\.00 +0\.00 +8\.0 GiB", printed
  )


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "cannot be read"),
    ("{}", "no list `bars`"),
    (json.dumps(content(bars=[{"label": "A", "flags": ""}])), "run --measure"),
  ],
)
def test_what_cannot_be_drawn_is_an_error(tmp_path, capsys, text, message):
  source = tmp_path / "bars.json"
  source.write_text(text, encoding="utf-8")
  assert memory_bars.main([str(source), "--out", str(tmp_path / "x.png")]) == 2
  assert message in capsys.readouterr().err


def test_a_refused_program_needs_more_than_its_known_parts():
  refused = bar(weights=4.0, moments=4.0, peak=8.1)
  refused["figures"]["components"]["activations"] = None
  assert memory_bars.gib(refused)["activations"] == 0
  assert memory_bars.peak_text(refused) == "> 8.1 GiB"
  assert memory_bars.peak_text(bar(peak=8.1)) == "8.1 GiB"


def test_measuring_replaces_the_figures_of_one_platform(tmp_path):
  # Stands for a Python with a compiler: records its arguments, prints figures.
  fake = tmp_path / "python"
  figures = json.dumps(bar(weights=3.0, peak=3.0)["figures"])
  fake.write_text(
    "#!/bin/sh\n"
    'case "$2" in train.memory) shift 2; echo "$@" >> "$0.asked"\n'
    f"echo '{figures}' ;; *) echo '{{\"jax\": \"1\"}}' ;; esac\n",
    encoding="utf-8",
  )
  fake.chmod(0o755)
  source = tmp_path / "bars.json"
  other = bar(weights=4.0) | {"flags": "--method adamw --target tpu:b"}
  bars = content(bars=[bar(weights=4.0), other])
  source.write_text(json.dumps(bars), encoding="utf-8")
  argv = [str(source), "--measure", "gpu", "--python", str(fake)]
  assert memory_bars.main(argv) == 0
  first, second = memory_bars.read(source)["bars"]
  assert memory_bars.gib(first)["weights"] == 3.0
  assert first["versions"] == {"jax": "1"}
  assert second == other
  asked = (tmp_path / "python.asked").read_text(encoding="utf-8")
  assert asked == "--method adamw --target gpu:a --json\n"
