"""GLUE and SQuAD by their names on the hub, through `datasets`' own code.

Only the address of the hub differs, as in test_hub.py.
"""

import json
import os
import pathlib
import subprocess
import sys

import datasets
import pytest

from tests.train import hub
from tests.train.finetuning import files
from train.finetuning.tasks import TASKS

ROOT = pathlib.Path(__file__).parents[3]
CARD = """---
configs:
- config_name: {name}
  data_files:
{files}
---
"""
USER = """
import json, pathlib, sys
from train.config.schema import SharedDataConfig
from train.common.errors import UserError
from train.finetuning import examples, tasks

for name, fields in map(json.loads, sys.stdin):
  try:
    read = examples.load(
      tasks.TASKS[name], SharedDataConfig(**fields), pathlib.Path(sys.argv[1])
    )
    found = {s.name: [s.first[0], s.labels[:3]]
             for s in (read.train, *read.evaluated)}
  except UserError as error:
    found = {"error": str(error)}
  print("FOUND", json.dumps(found, default=vars), flush=True)
"""


def publish(root, repository, name, splits, features=None):
  """Writes Parquet files and a card, in the layout of the hub."""
  folder = root / "datasets" / repository
  files = []
  for split, rows in splits.items():
    path = f"{name}/{split}-00000-of-00001.parquet"
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    if features:
      table = table.cast_column("label", features)
    table.to_parquet(str(folder / path))
    files.append(f"  - split: {split}\n    path: {path}")
  card = CARD.format(name=name, files="\n".join(files))
  (folder / "README.md").write_text(card)


@pytest.fixture
def server(tmp_path):
  root, mnli = tmp_path / "root", TASKS["mnli"]
  splits = {
    split: files.glue_rows(mnli, 6, i)
    for i, split in enumerate(("train", *mnli.validation))
  }
  names = datasets.ClassLabel(names=list(mnli.labels))
  publish(root, "nyu-mll/glue", "mnli", splits, names)
  rows = files.squad_rows(6, unanswerable=True)
  squad = {"train": rows, "validation": rows[3:]}
  publish(root, "rajpurkar/squad_v2", "squad_v2", squad)
  found = hub.Hub(root)
  yield found
  found.close()


def test_glue_and_squad_come_from_the_hub(server, tmp_path):
  asked = [
    ("mnli", {}),
    ("squad_v2", {}),
    ("rte", {}),
    ("squad", {}),
    ("mnli", {"validation": "test"}),
  ]
  done = subprocess.run(
    [sys.executable, "-c", USER, str(tmp_path / "cache")],
    input="\n".join(map(json.dumps, asked)),
    cwd=tmp_path, capture_output=True, text=True, timeout=300,
    env=os.environ | {
      "HF_ENDPOINT": server.url,
      "HF_HOME": str(tmp_path / "home"),
      "PYTHONPATH": str(ROOT),
    },
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  lines = [x for x in done.stdout.splitlines() if x.startswith("FOUND ")]
  mnli, squad, rte, absent, split = (json.loads(x[6:]) for x in lines)
  assert list(mnli) == ["train", "validation_matched", "validation_mismatched"]
  assert mnli["train"][1] == [0, 1, 2]
  assert squad["train"][1][2] == {"texts": [], "starts": []}
  assert squad["train"][1][0]["texts"]
  assert "hub:nyu-mll/glue:rte" in rte["error"]
  assert "hub:rajpurkar/squad is not on the hub" in absent["error"]
  assert "no split 'test' (data.validation)" in split["error"]
  assert not any("\n" in x.get("error", "") for x in (rte, absent, split))
