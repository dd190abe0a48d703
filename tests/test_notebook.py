"""docs/quickstart.ipynb: its committed outputs are those of its code.

The slow test runs it as a person does, in a kernel of its own.
"""

import ast
import base64
import contextlib
import importlib
import io
import re

import pytest

import galore_optax
from docs._ext import notebook as command
from tests import test_docs

NOTEBOOK = command.read()
CELLS = command.code_cells(NOTEBOOK)
ROW = re.compile(r"^([\w.]+) +([\d,]+) +(\d+)% +([\d.]+) +\d+$", re.M)
AGAIN = "run python docs/_ext/notebook.py (extra `notebook`)"


def results(printed):
  """State bytes, per cent of AdamW's and held-out loss of each optimizer."""
  return {
    name: (int(size.replace(",", "")), int(share), float(loss))
    for name, size, share, loss in ROW.findall(printed)
  }


def test_outputs_are_those_of_the_code():
  assert NOTEBOOK["metadata"]["code_sha256"] == command.code_hash(NOTEBOOK), (
    f"the code was changed after it ran: {AGAIN}"
  )
  counts = [cell["execution_count"] for cell in CELLS]
  assert counts == list(range(1, len(CELLS) + 1)), AGAIN
  outputs = [output for cell in CELLS for output in cell["outputs"]]
  assert {x["output_type"] for x in outputs} == {"stream", "display_data"}
  assert {x.get("name", "stdout") for x in outputs} == {"stdout"}, "a warning"
  (picture,) = (x["data"] for x in outputs if "data" in x)
  png = base64.b64decode(picture["image/png"])
  assert png.startswith(b"\x89PNG") and len(png) < 2**17
  found = results(command.printed(NOTEBOOK))
  assert list(found) == ["optax.adamw", "galore_adamw", "galore_adamw_8bit"]
  assert [x[1] for x in found.values()] == [100, 42, 15]


def test_code_compiles_and_its_names_exist():
  for cell in CELLS:
    for node in ast.walk(ast.parse(command.source(cell))):
      if isinstance(node, ast.Import):
        for alias in node.names:
          importlib.import_module(alias.name)
      elif ast.unparse(node).startswith("go.") and "(" not in ast.unparse(node):
        assert hasattr(galore_optax, node.attr)
  (install,) = (
    cell
    for cell in NOTEBOOK["cells"]
    if "install" in cell["metadata"].get("tags", ())
  )
  assert "%pip install" in command.source(install)


def test_the_plan_is_the_printed_one():
  """Runs all that comes before the training."""
  code = [command.source(cell) for cell in CELLS]
  (training,) = (i for i, text in enumerate(code) if "def run(" in text)
  out, namespace = io.StringIO(), {}
  with contextlib.redirect_stdout(out):
    exec(compile("\n".join(code[:training]), "quickstart", "exec"), namespace)
  plan = out.getvalue().partition("leaf ")[2]
  assert "layers/down" in plan
  assert plan in command.printed(NOTEBOOK), f"another plan: {AGAIN}"


def test_links_lead_somewhere():
  text = "".join(
    command.source(x) for x in NOTEBOOK["cells"] if x["cell_type"] == "markdown"
  )
  targets = re.findall(r"\]\(([^)]+)\)", text)
  assert len(targets) >= 5
  for target in targets:
    assert (command.PATH.parent / target).is_file(), target


@pytest.mark.slow
@pytest.mark.skipif(
  any(map(test_docs.is_missing, ("nbclient", "ipykernel"))),
  reason="running the notebook needs the extra `notebook`",
)
def test_a_run_prints_what_is_committed(monkeypatch):
  monkeypatch.setenv("PYTHONPATH", str(test_docs.ROOT))
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  committed = results(command.printed(NOTEBOOK))
  found = results(command.printed(command.execute()))
  assert list(found) == list(committed)
  for name, (size, share, loss) in committed.items():
    assert found[name][:2] == (size, share)
    # Python's text changes a little with its version.
    assert found[name][2] == pytest.approx(loss, abs=0.1)
