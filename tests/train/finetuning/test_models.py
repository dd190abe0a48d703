"""Encoders and LLaMAs with heads: rows, likelihoods, gradients."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from tests.train.conftest import TINY, WORDS
from tests.train.finetuning import files
from train.common.errors import UserError
from train.config.schema import SharedTrainConfig
from train.data import tokenizer
from train.finetuning import config as config_lib
from train.finetuning import (
  encoders,
  job,
  llamas,
  recipes,
)
from train.finetuning import examples as examples_lib
from train.finetuning.tasks import TASKS
from train.models import llama


def llama_model(writer, labels, length):
  task = TASKS["classify"].with_columns("", "", "", labels)
  config = config_lib.TaskConfig(prompt="{first} ")
  nothing = dict.fromkeys(("source", "graphdef", "boxes"))
  return llamas.LlamaTaskModel(
    task, config, length, False, model=TINY, writer=writer, **nothing
  )  # type: ignore


def test_an_evaluated_split_has_a_row_for_each_class(writer):
  found = llama_model(writer, ("peace", "people"), 64)
  split = examples_lib.Split("train", ["we hold", "these"], None, [0, 1])
  assert list(found.tokenize(split).is_right) == [True, False, False, True]
  learned = found.tokenize(dataclasses.replace(split, training=True))
  assert list(learned.is_right) == [True, True] and list(learned.classes) == [
    0,
    1,
  ]


def test_a_long_prompt_is_shortened_equally_for_all_classes(writer):
  labels = ("peace", "the people of these states")
  found = llama_model(writer, labels, 72)
  text = " ".join(WORDS * 20)
  split = examples_lib.Split("validation", [text, "we"], None, [0, 1])
  rows = found.tokenize(split).rows
  asked = [row.ids[: np.flatnonzero(row.loss_mask)[0]].tolist() for row in rows]
  assert asked[0] == asked[1] and asked[2] == asked[3] != asked[0]
  assert max(len(row.ids) for row in rows) == 72 > len(rows[0].ids)
  with pytest.raises(UserError, match="length=36 has no room"):
    llama_model(writer, labels, 36).tokenize(split)


@pytest.mark.parametrize(("described", "begins"), [
  ({}, True), ({"add_bos_token": False}, False), ({"add_bos_token": True}, True)
])  # fmt: skip
def test_a_text_begins_with_the_begin_token_of_its_tokenizer(described, begins):
  """Llama 3's tokenizer adds it in its post-processor only."""
  vocabulary = tokenizer.train([" ".join(WORDS) * 9], 290)
  vocabulary.add_special_tokens(["<s>", *files.SPECIAL_TOKENS])
  start = vocabulary.token_to_id("<s>")
  vocabulary.post_processor = tokenizers.processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", start)]
  )
  extra = {"tokenizer_config.json": {"bos_token": "<s>"} | described}
  found = types.SimpleNamespace(
    source="test", extra=extra, tokenizer=vocabulary.to_str()
  )
  writer = llamas._make_writer(found, recipes.make("chat", "galore"))  # type: ignore
  assert writer.begin == ((start,) if begins else ())


@pytest.mark.parametrize(("task", "prompt", "error"), [
  ("sst2", "is it good?", "must have {first}, the text of --task sst2"),
  ("rte", "{first}: so?", "must have {first} and {second}, the texts of"),
  ("sst2", "{first.x}", "must have {first}"),
  ("sst2", "{first!r}", "must have {first}"),
  ("sst2", "{first:d}", "must have {first}"),
  ("sst2", "{first} {", "for braces"),
])  # fmt: skip
def test_a_prompt_must_contain_the_texts_of_the_task(task, prompt, error):
  config = config_lib.TaskConfig(name=task, prompt=prompt)
  with pytest.raises(UserError, match=re.escape(error)):
    llamas.check_prompt(TASKS[task], config)
  fine = "{first} {second}" if task == "rte" else "{{}} {first}"
  llamas.check_prompt(TASKS[task], dataclasses.replace(config, prompt=fine))


def test_the_likeliest_class_is_predicted(writer):
  found = llama_model(writer, ("sad", "calm", "happy"), 64)
  split = examples_lib.Split("validation", ["we", "hold"], None, [2, 0])
  prepared = found.tokenize(split)
  values = [-5.0, -2.0, -3.0, -1.0, -7.0, -4.0]
  assert found.predict(prepared, dict(enumerate(values))).tolist() == [1, 0]


def test_an_encoder_predicts_the_largest_logit_or_the_number():
  logits = {0: np.array([0.1, 0.9, 0.2]), 1: np.array([3.0, 2.0, 2.5])}
  rows = types.SimpleNamespace(rows=[None] * 2)
  for name, want in (("mnli", [1, 0]), ("stsb", [0.1, 3.0])):
    nothing = dict.fromkeys(("config", "length", "loaded", "graphdef", "boxes"))
    found = encoders.EncoderTaskModel(TASKS[name], **nothing)  # type: ignore
    assert found.predict(rows, logits).tolist() == want  # type: ignore


def test_the_likelihood_of_a_class_is_that_of_its_tokens(writer):
  model = dataclasses.replace(TINY, n_layers=1)
  graphdef, boxes = llama.abstract(model)
  params = llama.init(model, 0)
  found = dataclasses.replace(
    llama_model(writer, ("peace", "people"), 64), graphdef=graphdef, boxes=boxes
  )
  rows = found.tokenize(examples_lib.Split("validation", ["we"], None, [1]))
  batch = found.collate(rows, [0, 1], 2)
  outputs = found.outputs(params, batch)
  for i, row in enumerate(rows.rows):
    logits = llama.apply(graphdef, params, jnp.asarray(row.ids[None, :-1]))
    logs = np.asarray(jax.nn.log_softmax(logits[0]))
    learned = np.flatnonzero(row.loss_mask)
    want = sum(logs[k - 1, row.ids[k]] for k in learned)
    np.testing.assert_allclose(outputs[i], want, rtol=1e-5)


def test_accumulation_gives_the_same_gradient(writer):
  """Even if the parts have different numbers of tokens in the loss."""
  model = dataclasses.replace(TINY, n_layers=1)
  graphdef, boxes = llama.abstract(model)
  params = llama.init(model, 0)
  found = dataclasses.replace(
    llama_model(writer, ("peace", "the people of these states"), 64),
    graphdef=graphdef,
    boxes=boxes,
  )
  split = examples_lib.Split("train", ["we", "hold", "we hold", "the"], None,
                         [0, 0, 1, 1], training=True)  # fmt: skip
  batch = found.collate(found.tokenize(split), range(4), 4)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = types.SimpleNamespace(
    weight_shardings=jax.tree.map(lambda _: here, params)
  )
  results = []
  for parts in (1, 2):
    settings = SharedTrainConfig(accumulate=parts)
    gradient = job.make_gradient(found, abstract, settings)  # type: ignore
    results.append(jax.jit(gradient)(params, batch, 0))
  (grads, loss, tokens), (others, other, count) = results
  assert int(tokens) == int(count)
  np.testing.assert_allclose(loss, other, rtol=1e-6)
  same = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
  jax.tree.map(same, grads, others)


def test_conversations_in_one_row_do_not_attend_to_each_other():
  model = dataclasses.replace(TINY, n_layers=1)
  graphdef, _ = llama.abstract(model)
  params = llama.init(model, 0)
  ids = jax.random.randint(jax.random.key(0), (1, 12), 0, 290)
  segments = np.array([[1] * 5 + [2] * 7])
  run = jax.jit(lambda x, s=None: llama.apply(graphdef, params, x, s))
  together = run(ids, segments)
  apart = run(ids[:, 5:])
  np.testing.assert_allclose(together[:, 5:], apart, atol=2e-5)
  assert abs(run(ids)[:, 5:] - apart).max() > 1e-3
