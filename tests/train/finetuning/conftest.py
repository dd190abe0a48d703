"""Fixtures of the tests of fine-tuning."""

import pytest

from tests.train.conftest import WORDS
from tests.train.finetuning import files
from train.data import tokenizer
from train.finetuning import (
  chat,
)


@pytest.fixture(scope="module")
def writer():
  vocabulary = tokenizer.train([" ".join(WORDS) * 9], 290)
  vocabulary.add_special_tokens(list(files.SPECIAL_TOKENS))
  return chat.make_writer(
    "chatml", vocabulary.to_str(), files.SPECIAL_TOKENS[1]
  )
