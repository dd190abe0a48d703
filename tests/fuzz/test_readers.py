"""Readers of files, on damaged files: a line of refusal, or a result.

No mutant may end in a traceback, take forever or all memory, end the process,
or change what is read where a checksum or a type should notice it.
"""

import collections
import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("gguf", reason="needs the extra `gguf`")
pytest.importorskip("sentencepiece", reason="needs the extra `test`")

READERS = (
  "llama",
  "bert",
  "roberta",
  "gguf",
  "run",
  "checkpoint",
  "tokenizer",
  "sentencepiece",
  "data",
)
FINE = {"refused", "read", "other result"}
ROOT = pathlib.Path(__file__).parents[2]


def fuzz(folder: pathlib.Path, first: int, count: int, *names: str) -> int:
  """Runs a worker; returns its exit status."""
  command = [sys.executable, "-m", "tests.fuzz.worker", str(folder)]
  with (folder / "errors.txt").open("a") as errors:
    return subprocess.run(
      [*command, str(first), str(count), *names],
      cwd=ROOT,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
      stderr=errors,
      check=False,
    ).returncode


def outcomes(folder: pathlib.Path) -> tuple[dict, list[dict]]:
  """The outcome of each mutant, and those that ended the process."""
  done, begun = {}, []
  lines = (folder / "outcomes.jsonl").read_text(encoding="utf-8").splitlines()
  for record in map(json.loads, lines):
    key = record["reader"], record["seed"]
    if "outcome" in record:
      done[key] = record
    else:
      begun.append(record)
  return done, [r for r in begun if (r["reader"], r["seed"]) not in done]


def described(record: dict) -> str:
  """A mutant that did harm."""
  which = "{reader} {seed}: {file}, {how}".format(**record)
  outcome = record.get("outcome", "ended the process")
  return f"{which}: {outcome} {record.get('text', '')[-400:]}"


def check(folder: pathlib.Path, names: tuple[str, ...], count: int) -> None:
  """Asserts that all mutants were read, and that none did harm."""
  done, lost = outcomes(folder)
  harmful = [r for r in done.values() if r["outcome"] not in FINE]
  assert not "\n".join(map(described, lost + harmful))
  for name in names:
    found = [r for (reader, seed), r in done.items() if reader == name]
    kinds = collections.Counter(r["outcome"] for r in found if r["seed"] >= 0)
    assert done[name, -1]["outcome"] == "read"
    assert kinds.total() == count and kinds["refused"] > count / 10
    print(name, dict(kinds))


def test_a_few_mutants_of_every_reader(tmp_path):
  fuzz(tmp_path, 0, 20, *READERS)
  check(tmp_path, READERS, 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_mutants(name, tmp_path):
  first, count = 20, 2000
  end = first + count
  while fuzz(tmp_path, first, end - first, name):
    _, lost = outcomes(tmp_path)  # goes on after the mutant that ended it
    assert lost, (tmp_path / "errors.txt").read_text()[-2000:]
    first = lost[-1]["seed"] + 1
  check(tmp_path, (name,), count)
