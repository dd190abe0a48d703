"""C4 and t5-base from the hub, through the libraries' own code.

Only the address of the hub differs: a local server answers. The libraries read
the address when they are imported, so each test runs in its own process.
"""

import gzip
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.train import hub
from tests.train.data.test_tokenizer import t5_like

ROOT = pathlib.Path(__file__).parents[3]
CARD = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: en/c4-train.*.json.gz}
  - {split: validation, path: en/c4-validation.*.json.gz}
- config_name: en.noblocklist
  data_files:
  - {split: train, path: en/c4-train.*.json.gz}
---
"""

# Prints what `corpus.prepare` and a loader return for each config, as JSON.
USER = """
import json, sys
from train.data import corpus as corpus_lib
from train.config.schema import DataConfig
from train.common.errors import UserError

for fields in map(json.loads, sys.stdin):
  settings = {"path": "hub:allenai/c4:en", "tokenizer": "hub:t5-base",
              "length": 16, "batch": 4, "shuffle_buffer": 30, "eval_rows": 8,
              "cache": sys.argv[1], "prefetch": 2}
  try:
    corpus = corpus_lib.prepare(DataConfig(**(settings | fields)), 44)
    with corpus.loader(0) as loader:
      batches = [next(loader).tolist() for _ in range(12)]
      state = loader.state()
      after = next(loader).tolist()
    with corpus.loader(0, state=state) as loader:
      again = next(loader).tolist()
    def decode(rows):
      return corpus.tokenizer.decode([i for row in rows for i in row if i >= 0])
    found = {"first": decode(batches[0]), "state": state, "after": after,
             "again": again, "held_out": decode(corpus.held_out.tolist()),
             "entries": corpus.tokenizer.get_vocab_size(),
             "largest": max(max(r) for b in batches for r in b)}
  except UserError as error:
    found = {"error": str(error)}
  print("FOUND", json.dumps(found), flush=True)
"""


def write_shard(path, split, shard, count=40):
  lines = [
    {
      "text": f"the {split} {chr(97 + shard)} {i} </s> <extra_id_3>",
      "timestamp": "2019-04-25T12:57:54Z",
      "url": "https://example.org",
    }
    for i in range(count)
  ]
  path.parent.mkdir(parents=True, exist_ok=True)
  raw = "\n".join(json.dumps(line) for line in lines)
  path.write_bytes(gzip.compress(raw.encode()))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  root = tmp_path_factory.mktemp("hub")
  c4 = root / "datasets" / "allenai" / "c4"
  for shard in range(4):
    name = f"en/c4-train.{shard:05d}-of-00004.json.gz"
    write_shard(c4 / name, "train", shard)
  name = "en/c4-validation.00000-of-00001.json.gz"
  write_shard(c4 / name, "held", 0)
  (c4 / "README.md").write_text(CARD)
  (root / "datasets" / "owner" / "gated").mkdir(parents=True)
  model = root / "models" / "t5-base"
  model.mkdir(parents=True)
  (model / "tokenizer.json").write_text(t5_like()[0].to_str())
  (model / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
  found = hub.Hub(root)
  found.gated.add("owner/gated")
  yield found
  found.close()


def as_user(address, folder, configs, **environment):
  """Runs USER in its own process; returns its result for each config."""
  environment = os.environ | environment | {
    "HF_ENDPOINT": address,
    "HF_HOME": str(folder / "home"),
    "PYTHONPATH": str(ROOT),
  }  # fmt: skip
  done = subprocess.run(
    [sys.executable, "-c", USER, str(folder / "cache")],
    input="\n".join(map(json.dumps, configs)),
    cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  return [json.loads(x[6:]) for x in lines if x.startswith("FOUND ")]


def test_c4_is_read_and_continued(server, tmp_path):
  good = [{}, {"rows": "padded"}, {"stream": "false"}, {"validation": "none"}]
  bad = {
    "has no split 'test' (data.split); its splits are train": {"split": "test"},
    "has no split 'test' (data.validation)": {"validation": "test"},
    "are both 'train'": {"validation": "train"},
    "no field 'body'; its fields are text, timestamp": {"text_field": "body"},
    "['en', 'en.noblocklist'] A subset": {"path": "hub:allenai/c4:x"},
    "Config name is missing": {"path": "hub:allenai/c4"},
    "hub:a/b is not on the hub": {"path": "hub:a/b"},
    "is gated: accept its terms": {"path": "hub:owner/gated"},
    "hub:a b cannot be read: Repo id must": {"path": "hub:a b"},
    "hub:t5-none is not on the hub": {"tokenizer": "hub:t5-none"},
    "data.tokenizer hub:owner/gated is": {"tokenizer": "hub:owner/gated"},
  }  # fmt: skip
  server.gated.add("owner/gated")
  found = as_user(server.url, tmp_path, [*good, *bad.values()])
  for result in found[: len(good)]:
    assert result["after"] == result["again"]
    assert result["largest"] < result["entries"] == 44
    assert "the train" in result["first"]
  packed, padded, whole, split = found[: len(good)]
  assert packed["state"]["shards"] == padded["state"]["shards"] == 4
  assert whole["state"] == {"batches": 12}
  assert packed["held_out"].startswith("the held a 0")
  assert split["held_out"].startswith("the train")
  for message, result in zip(bad, found[len(good) :], strict=True):
    assert message in result["error"] and "\n" not in result["error"], result


def test_an_unreachable_hub_is_reported(tmp_path):
  found = as_user(
    "http://127.0.0.1:9", tmp_path,
    [{}, {"path": "", "validation": ""}], HF_HUB_OFFLINE="1",
  )  # fmt: skip
  names = ("hub:allenai/c4:en", "hub:t5-base")
  for result, name in zip(found, names, strict=True):
    assert f"{name}: the hub cannot be reached" in result["error"]
    assert "HF_HUB_OFFLINE is set, or use local files" in result["error"]
