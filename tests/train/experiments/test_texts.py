"""The parts of a text."""

import json

import pytest

from tests.train import conftest
from train.common.errors import UserError
from train.data import holdout
from train.experiments import (
  texts,
)


def test_the_parts_of_a_text_share_no_document(tmp_path):
  path = tmp_path / "text.txt"
  text = conftest.speech(80)
  path.write_text(f"{text}\n\n{conftest.speech(60)}", encoding="utf-8")
  parts = texts.prepare(str(path), tmp_path / "cache")
  digests = [
    {
      holdout.digest(json.loads(line)["text"])
      for line in part.read_text(encoding="utf-8").splitlines()
    }
    for part in parts
  ]
  assert all(digests) and len(set.union(*digests)) == 80
  assert sum(map(len, digests)) == 80
  assert texts.prepare(str(path), tmp_path / "cache") == parts


def test_a_missing_text_is_an_error(tmp_path):
  with pytest.raises(UserError, match="reviews"):
    texts.prepare("nothing", tmp_path)
