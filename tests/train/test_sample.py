import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.conftest import TINY
from train import sample
from train.config.schema import MeshConfig
from train.data import tokenizer
from train.models import llama
from train.parallel import mesh
from train.pretrained import llama_checkpoint, llama_names
from train.sample import Sampling

CONFIG = dataclasses.replace(TINY, n_kv_heads=2)
PROMPTS = [[5, 6, 7], [40, 41, 42, 43, 44, 45, 46], [9]]
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def params():
  # Larger than initial weights, so that logits are far apart.
  return jax.tree.map(lambda x: x * 3, llama.init(CONFIG, 0))


@pytest.fixture(scope="module")
def full(params):
  """Logits of each position by the model without a cache."""
  graphdef, _ = llama.abstract(CONFIG)
  run = jax.jit(llama.apply, static_argnums=0)

  def logits(ids):
    row = np.zeros((1, 32), np.int32)
    row[0, : len(ids)] = ids
    return np.asarray(run(graphdef, params, row))[0, : len(ids)]

  return logits


@pytest.fixture(scope="module")
def greedy(params):
  return sample.generate(CONFIG, params, PROMPTS, 20, GREEDY)


def test_greedy_tokens_are_those_of_the_model_without_a_cache(greedy, full):
  for prompt, drawn in zip(PROMPTS, greedy, strict=True):
    ids = [*prompt, *drawn.tolist()]
    expected = full(ids).argmax(-1)
    assert ids[len(prompt) :] == expected[len(prompt) - 1 : -1].tolist()
  assert len(set(greedy.ravel().tolist())) > 5


def test_logits_with_a_cache_are_those_without(params, full):
  ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
  cache, found = llama.empty_cache(CONFIG, 1, 16), []
  # Some at once, then one by one, like prompts and their continuations.
  for part in ([0, 1, 2, 3, 4], [5], [6], [7], [8, 9]):
    tokens = jnp.asarray([[ids[i] for i in part]])
    x, cache = llama.extend(CONFIG, params, tokens, jnp.array([part]), cache)
    found.append(llama.head(CONFIG, params, x, 1)[0])
  np.testing.assert_allclose(np.concatenate(found), full(ids), atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours(params, greedy):
  alone = sample.generate(CONFIG, params, PROMPTS[:1], 20, GREEDY)
  assert alone[0].tolist() == greedy[0].tolist()


def test_the_seed_decides_the_tokens(params):
  how = Sampling(1.5)
  draw = lambda seed: sample.generate(CONFIG, params, PROMPTS, 20, how, seed)
  first = draw(3)
  assert (first == draw(3)).all()
  assert (first != draw(4)).any()


LOGITS = jnp.log(jnp.array([0.05, 0.5, 0.15, 0.3]))


def shares(how, count=4000):
  keys = jax.random.split(jax.random.key(0), count)
  drawn = jax.vmap(lambda key: sample.draw(LOGITS[None], how, key)[0])(keys)
  found = collections.Counter(np.asarray(drawn).tolist())
  return [found[i] / count for i in range(4)]


@pytest.mark.parametrize(
  "how, expected",
  [
    (Sampling(), [0.05, 0.5, 0.15, 0.3]),
    (Sampling(0.5), [0.00685, 0.68493, 0.06164, 0.24658]),
    (Sampling(top_k=2), [0, 0.625, 0, 0.375]),
    # 0.5 + 0.3 is less than 0.85, so a third token is added.
    (Sampling(top_p=0.85), [0, 0.52632, 0.15789, 0.31579]),
    (Sampling(top_p=0.75), [0, 0.625, 0, 0.375]),
    # Of the two remaining tokens, the first has 0.625.
    (Sampling(top_k=2, top_p=0.6), [0, 1, 0, 0]),
    (Sampling(top_p=1e-9), [0, 1, 0, 0]),
    (GREEDY, [0, 1, 0, 0]),
  ],
)
def test_tokens_are_drawn_with_the_remaining_probabilities(how, expected):
  np.testing.assert_allclose(shares(how), expected, atol=0.03)


def test_top_k_keeps_k_of_equally_likely_tokens():
  keys = jax.random.split(jax.random.key(0), 200)
  draw = lambda key: sample.draw(jnp.zeros((1, 6)), Sampling(top_k=2), key)
  assert len(set(np.asarray(jax.vmap(draw)(keys)).ravel().tolist())) == 2


@pytest.fixture(scope="module")
def folder(params, tmp_path_factory):
  """The model as an exported folder, with a tokenizer for it."""
  text = "we the people of these states hold that peace and union are one "
  trained = tokenizer.train([text * 9], CONFIG.vocab_size)
  extra = {"config.json": {"eos_token_id": trained.token_to_id("one")}}
  given = llama_names.from_params(
    "test", CONFIG, lambda: params, tokenizer=trained.to_str(), extra=extra
  )
  out = tmp_path_factory.mktemp("model") / "folder"
  llama_checkpoint.save(given, out)
  return out


def command(capsys, folder, *flags):
  assert sample.main([str(folder), *flags]) == 0
  return capsys.readouterr().out


def test_the_command_continues_a_prompt(folder, capsys, params):
  flags = ("--temperature", "0", "--tokens", "20")
  text = command(capsys, folder, "--prompt", "we the people", *flags)
  trained = tokenizer.tokenizers.Tokenizer.from_file(
    str(folder / "tokenizer.json")
  )
  ids = trained.encode("we the people").ids
  drawn = sample.generate(CONFIG, params, [ids], 20, GREEDY)[0].tolist()
  assert text == trained.decode(ids + drawn).rstrip("�") + "\n"
  both = ("--prompt", "we the people", "--prompt", "peace")
  texts = command(capsys, folder, *both, *flags)
  assert texts.startswith(text.rstrip("\n")[:20]) and "\n\npeace" in texts


def test_a_text_ends_at_its_end_token(capsys):
  trained = tokenizer.train(["one two three " * 9], 300)
  ids = trained.encode("one two").ids
  chunks = (np.array([row]) for row in (ids, [0, *ids], ids))
  sample.say(chunks, trained, ids, ends=(0,))
  assert capsys.readouterr().out == "one twoone two\n"
  assert sample.until([4, 5, 0, 6], (0,)) == [4, 5]


def test_characters_are_printed_when_they_are_complete(capsys):
  trained = tokenizer.train(["plain"], 257)
  ids = trained.encode("a é").ids
  chunks = (np.array([[token]]) for token in ids[1:])
  sample.say(chunks, trained, ids[:1], ends=())
  assert capsys.readouterr().out == "a é\n"


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--prompt", "", "--tokens", "4"], "has no tokens"),
    (["--prompt", "we", "--tokens", "0"], "--tokens is 0"),
    (["--prompt", "we", "--top-p", "0"], "--top-p is 0.0"),
    (["--prompt", "we", "--top-k", "-1"], "--top-k is -1"),
    (["--prompt", "we", "--temperature", "-1"], "--temperature is -1.0"),
  ],
)
def test_the_command_rejects_invalid_values(folder, capsys, flags, message):
  assert sample.main([str(folder), *flags]) == 2
  assert message in capsys.readouterr().err


def test_sharded_parameters_give_the_same_tokens(params, greedy):
  grid = mesh.make_mesh(MeshConfig(fsdp=2, tensor=2), 8, jax.devices()[:4])
  shardings = mesh.param_shardings(llama.abstract(CONFIG)[1], grid)
  sharded = jax.device_put(params, shardings)
  assert len(sharded["layers"]["attn"]["q"]["kernel"].sharding.device_set) == 4
  with jax.set_mesh(grid):
    found = sample.generate(CONFIG, sharded, PROMPTS, 20, GREEDY)
  assert found.tolist() == greedy.tolist()
