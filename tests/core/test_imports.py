"""Modules of the library import each other in one direction only."""

import ast
import pathlib

import pytest

import galore_optax

ROOT = pathlib.Path(galore_optax.__file__).parent
# Each part may import from the parts in the rows above its own.
ROWS = (
  {"checks", "context", "flax_dicts", "linalg", "old_spellings"},
  {"quantization"},
  {"tree"},
  {"inner", "quantized_params", "subspace"},
  {"_chain", "projected", "residual"},
  {"transform"},
  {"_galore"},
  {"_value_and_grad", "baselines", "diagnostics", "optimizers", "per_layer"},
)
ROW = {name: i for i, names in enumerate(ROWS) for name in names}
FILES = [x for x in sorted(ROOT.rglob("*.py")) if x != ROOT / "__init__.py"]


def part(path):
  return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(path):
  """Names of the parts of the library that a file imports from."""
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.ImportFrom) and node.module == "galore_optax":
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module is not None:
      package, _, rest = node.module.partition(".")
      if package == "galore_optax":
        yield rest.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda x: str(x.relative_to(ROOT)))
def test_imports_go_one_way(path):
  own = part(path)
  for other in imported_parts(path):
    assert other == own or ROW[other] < ROW[own], f"imports {other}"
