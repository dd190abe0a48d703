"""A tiny run of pre-training that nothing happens to, and its flags."""

import pytest

from tests.train.run.small_run import SETTINGS
from train import pretrain


@pytest.fixture(scope="module")
def flags(text_file, tmp_path_factory):
  settings = SETTINGS | {
    "data.path": text_file,
    "data.cache": tmp_path_factory.mktemp("cache"),
  }
  return [x for k, v in settings.items() for x in ("--set", f"{k}={v}")]


@pytest.fixture(scope="module")
def whole(one_device, undrawn, flags, tmp_path_factory):
  """The run that nothing happens to."""
  out = tmp_path_factory.mktemp("whole") / "run"
  assert pretrain.main(["--out", str(out), *flags]) == 0
  return out
