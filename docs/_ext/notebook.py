"""Runs docs/quickstart.ipynb and writes its outputs into it.

    pip install -e ".[notebook]" && python docs/_ext/notebook.py

Cells with the tag `install` are left out: what they install is there. The
notebook's metadata keeps a hash of the code, by which a test sees that outputs
are those of the code.
"""

import hashlib
import json
import os
import pathlib
from typing import Any

PATH = pathlib.Path(__file__).parents[1] / "quickstart.ipynb"


def read(path: pathlib.Path = PATH) -> dict[str, Any]:
  """The notebook as nested dicts, without its libraries."""
  return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
  """The cells that run here: code, but not what installs packages."""
  return [
    cell
    for cell in notebook["cells"]
    if cell["cell_type"] == "code"
    and "install" not in cell["metadata"].get("tags", ())
  ]


def source(cell: dict[str, Any]) -> str:
  """The text of a cell."""
  return "".join(cell["source"])


def code_hash(notebook: dict[str, Any]) -> str:
  """A hash of the code that runs."""
  code = [source(cell) for cell in code_cells(notebook)]
  return hashlib.sha256(json.dumps(code).encode()).hexdigest()


def printed(notebook: dict[str, Any]) -> str:
  """All that the cells print."""
  return "".join(
    "".join(output["text"])
    for cell in code_cells(notebook)
    for output in cell["outputs"]
    if output["output_type"] == "stream" and output["name"] == "stdout"
  )


def execute(path: pathlib.Path = PATH) -> dict[str, Any]:
  """The notebook with the outputs of a run in a kernel of its own.

  Raises:
    nbclient.exceptions.CellExecutionError: A cell failed.
  """
  import nbclient
  import nbformat

  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(
    notebook,
    timeout=900,
    kernel_name="python3",
    skip_cells_with_tag="install",
    coalesce_streams=True,
    record_timing=False,
    resources={"metadata": {"path": str(path.parent)}},
  )
  client.execute()
  return json.loads(nbformat.writes(notebook))


def main() -> None:
  """Runs the notebook and replaces its outputs."""
  notebook = execute()
  notebook["metadata"] = {
    "kernelspec": read()["metadata"]["kernelspec"],
    "language_info": {"name": "python"},
    "code_sha256": code_hash(notebook),
  }
  text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
  new = PATH.with_suffix(".new")
  new.write_text(text, encoding="utf-8")
  os.replace(new, PATH)
  print(printed(notebook), end="")


if __name__ == "__main__":
  main()
