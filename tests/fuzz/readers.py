"""Every reader of files: how a sound folder is made, and how it is read.

`read` returns a text that differs if anything that was read does.
"""

import csv
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import safetensors.numpy
import tokenizers
from pyarrow import parquet

from tests.train.conftest import TINY, make_trainer
from tests.train.finetuning import files
from tests.train.pretrained import encoder_files
from tests.train.test_plot import make_run
from train.config import presets, schema
from train.data import sources
from train.data import tokenizer as tokenizer_lib
from train.finetuning import examples as examples_lib
from train.finetuning.tasks import TASKS
from train.models import encoder, llama
from train.pretrained import (
  checkpoint_folder,
  encoder_checkpoint,
  encoder_names,
  llama_checkpoint,
  llama_names,
  mapping,
)
from train.run import checkpoint, history, metrics, run_dir

MODEL = schema.ModelConfig(
  vocab_size=300, d_model=16, d_ff=24, n_layers=2, n_heads=2, family="qwen3",
  qk_norm=True, head_dim=12, sliding_window=5, window_layers="1",
  rope_scaling="yarn", rope_factor=2.0, rope_original_length=8,
)  # fmt: skip
ENCODER = encoder.Config(60, 16, 24, 2, 2, max_length=32, labels=2)
ROBERTA = encoder.Config(
  400, 16, 24, 1, 2, "roberta", max_length=32, position_offset=2, n_types=1,
  pad_id=1,
)  # fmt: skip
BASE = presets.make("sotu_small", "galore")
WORDS = "we the people of these states hold that union and peace are one " * 3


class Reader(NamedTuple):
  """A reader and its sound files."""

  make: Callable[[pathlib.Path], None]
  read: Callable[[pathlib.Path], str]
  # JSON files whose fields are read by type: another type must be noticed,
  # unless nothing reads the field.
  typed: tuple[str, ...] = ()
  # Folders under checksums: no change of their bytes may change what is read.
  guarded: tuple[str, ...] = ()


def digest(*parts: Any) -> str:
  """A hash of arrays, and of the reprs of everything else."""
  found = hashlib.blake2b(digest_size=12)
  for part in jax.tree.leaves(parts):
    if isinstance(part, np.ndarray | jax.Array):
      array = np.asarray(part)
      found.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    else:
      found.update(repr(part).encode())
  return found.hexdigest()


@functools.cache
def vocabulary() -> str:
  """The text of a tokenizer.json."""
  return tokenizer_lib.train([WORDS], 300).to_str()


def random_params(boxes: Any) -> dict:
  """Weights without compiling anything."""
  random = np.random.default_rng(0)
  return mapping.nested(
    {
      path: random.normal(0, 0.1, shape).astype(np.float32)
      for path, shape in mapping.param_shapes(boxes).items()
    }
  )


def make_llama(folder: pathlib.Path) -> None:
  params = random_params(llama.abstract(MODEL)[1])
  ids = {"eos_token_id": 0}
  weights = llama_names.from_params(
    "test",
    MODEL,
    lambda: params,
    tokenizer=vocabulary(),
    extra={
      "config.json": {"max_position_embeddings": 64, "bos_token_id": 1} | ids,
      "generation_config.json": ids,
      "tokenizer_config.json": {"eos_token": tokenizer_lib.END},
    },
  )
  llama_checkpoint.save(weights, folder)
  shards: dict[str, dict[str, Any]] = {"a.safetensors": {}, "b.safetensors": {}}
  tensors = safetensors.numpy.load_file(folder / checkpoint_folder.WEIGHTS)
  (folder / checkpoint_folder.WEIGHTS).unlink()
  for i, (name, tensor) in enumerate(sorted(tensors.items())):
    shards["ab"[i % 2] + ".safetensors"][name] = tensor
  for file, part in shards.items():
    safetensors.numpy.save_file(part, folder / file, {"format": "pt"})
  index = {name: file for file, part in shards.items() for name in part}
  (folder / checkpoint_folder.INDEX).write_text(
    json.dumps({"weight_map": index})
  )


def read_llama(folder: pathlib.Path) -> str:
  weights = llama_checkpoint.load(folder)
  config = llama_checkpoint.adopt(BASE, folder)
  parsed = tokenizer_lib.parse(weights.tokenizer, str(folder))
  params = llama_names.to_params(weights)
  return digest(
    weights.model, weights.end_ids, config.data.end_token, params,
    parsed.to_str(),
  )  # fmt: skip


def make_bert(folder: pathlib.Path) -> None:
  encoder_files.write_bert(folder)
  _make_encoder(folder, ENCODER)


def make_roberta(folder: pathlib.Path) -> None:
  encoder_files.write_roberta(folder)
  _make_encoder(folder, ROBERTA)


def _make_encoder(folder: pathlib.Path, model: encoder.Config) -> None:
  params = random_params(encoder.abstract(model)[1])
  tensors = encoder_names.to_tensors(model, params)
  safetensors.numpy.save_file(tensors, folder / checkpoint_folder.WEIGHTS)
  config = encoder_names.config_to_hf(model, {"id2label": {"0": "a"}})
  (folder / "config.json").write_text(json.dumps(config))
  (folder / "tokenizer_config.json").write_text(
    json.dumps(
      {"do_lower_case": True, "strip_accents": False, "add_prefix_space": True}
    )
  )


def read_encoder(folder: pathlib.Path) -> str:
  found = encoder_checkpoint.load(folder, head="classify")
  rows = found.tokenizer.texts(["we the people"], ["who? Ünion"])
  return digest(found.config, found.params, [list(map(tuple, r)) for r in rows])


def make_gguf(folder: pathlib.Path) -> None:
  from tests.train.pretrained import test_gguf

  params = random_params(llama.abstract(test_gguf.MODEL)[1])
  test_gguf.write(folder / "model.gguf", params)


def read_gguf(folder: pathlib.Path) -> str:
  weights = llama_checkpoint.load(folder / "model.gguf")
  return digest(weights.model, weights.end_ids, llama_names.to_params(weights))


def make_run_folder(folder: pathlib.Path) -> None:
  make_run(folder / "run")
  for file in (folder / "run").iterdir():
    file.rename(folder / file.name)
  (folder / "run").rmdir()
  (folder / "tokenizer.json").write_text(vocabulary())
  (folder / "text.json").write_text(
    json.dumps({"digest": "0f", "end_token": tokenizer_lib.END})
  )


def read_run(folder: pathlib.Path) -> str:
  run_dir.check_folder(folder, BASE, overwrite=False)
  run = history.load(folder)
  series = [
    run.series(name, axis, needed)
    for name in ("loss", "held_out_perplexity")
    for axis, needed in (("steps", ""), ("tokens", "loss"), ("hours", ""))
  ]
  log = metrics.Log(folder, 50)
  log.close()
  return digest(
    history.labels([run, run]), run.watched(), series,
    run_dir.examples_digest(folder),
  )  # fmt: skip


@functools.cache
def trainer() -> Any:
  return make_trainer("adamw", devices=1, model=MODEL)


def make_checkpoint(folder: pathlib.Path) -> None:
  made = schema.override(
    BASE,
    [f"model.{name}={value}" for name, value in vars(MODEL).items()]
    + ["optimizer.name=adamw", "optimizer.residual=none"],
  )
  run_dir.write_config(folder, made, overwrite=False)
  (folder / "tokenizer.json").write_text(vocabulary())
  run_dir._record_data(folder, {"digest": "0", "end_token": tokenizer_lib.END},
                       "")  # fmt: skip
  store = checkpoint.Checkpoints(folder, 2)
  state = trainer().init()
  store.save(state._replace(step=state.step + 3), checkpoint.Progress(
    1.0, {"batches": 3}
  ), 2.5)  # fmt: skip
  store.close()


def read_checkpoint(folder: pathlib.Path) -> str:
  restored = checkpoint.restore(folder, trainer().abstract, lambda text: None)
  state, position = None, None
  if restored is not None:
    state, position = jax.device_get(restored[0]), restored[1].data
  store = checkpoint.Checkpoints(folder, 2, 1)
  store.best()  # its numbers are under no checksum
  store.close()
  weights = llama_checkpoint.load(folder)
  params = llama_names.to_params(weights)
  return digest(state, position, weights.end_ids, weights.extra, params)


def make_tokenizer(folder: pathlib.Path) -> None:
  (folder / "tokenizer.json").write_text(vocabulary())
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"eos_token": {"content": tokenizer_lib.END}})
  )


def _encoded(path: pathlib.Path, folder: pathlib.Path) -> str:
  config = schema.DataConfig(tokenizer=str(path))
  found = tokenizer_lib.find(config, 300, [], folder)
  return digest(found.end, found.unknown, found.encode([WORDS, "ü </s> 1"]),
                found.measure(["we the 1790"]))  # fmt: skip


def read_tokenizer(folder: pathlib.Path) -> str:
  return _encoded(folder / "tokenizer.json", folder)


def make_sentencepiece(folder: pathlib.Path) -> None:
  from sentencepiece import sentencepiece_model_pb2 as pb2

  for name, kind in (("unigram", 1), ("bpe", 2)):
    proto = pb2.ModelProto()
    proto.trainer_spec.model_type = kind
    proto.trainer_spec.byte_fallback = kind == 2
    proto.normalizer_spec.add_dummy_prefix = True
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    if kind == 2:
      pieces += [(f"<0x{i:02X}>", 6) for i in range(256)]
    pieces += [(c, 1) for c in ("▁we", "▁the", "▁w", "▁t", "he")]
    pieces += [(c, 1) for c in "▁abcdefghijklmnopqrstuvwxyz"]
    for i, (piece, type_) in enumerate(pieces):
      proto.pieces.add(piece=piece, score=-float(i), type=type_)
    (folder / f"{name}.model").write_bytes(proto.SerializeToString())


def read_sentencepiece(folder: pathlib.Path) -> str:
  paths = sorted(folder.glob("*.model"))
  return digest([_encoded(path, folder) for path in paths])


ROWS = [{"text": f"{WORDS} {i}", "label": i % 2} for i in range(8)]


def make_data(folder: pathlib.Path) -> None:
  (folder / "a.jsonl").write_text(
    "".join(json.dumps(row) + "\n" for row in ROWS)
  )
  files.write_lines(folder / "chat.jsonl", files.conversations(8))
  files.write_lines(folder / "squad_v2.jsonl", files.squad_rows(8, True))
  with (folder / "a.csv").open("w", newline="") as file:
    table = csv.DictWriter(file, ["text", "label"])
    table.writeheader()
    table.writerows(ROWS)
  parquet.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet")
  (folder / "a.txt").write_text("\n\n".join(row["text"] for row in ROWS))


def read_data(folder: pathlib.Path) -> str:
  """Reads the file that differs from a sound one, as text and as examples."""
  sound = folder.with_name("data-sound")
  for path in sorted(sound.iterdir()):
    other = folder / path.name
    if not other.is_file() or other.read_bytes() != path.read_bytes():
      return _read_data(other, folder)
  return "sound"


def _read_data(path: pathlib.Path, folder: pathlib.Path) -> str:
  cache = folder / "cache"
  if path.stem in TASKS:
    config = schema.DataConfig(path=str(path), holdout_every=2)
    return examples_lib.digest(
      examples_lib.load(TASKS[path.stem], config, cache)
    )
  encoder_ = tokenizer_lib.make_encoder(
    tokenizers.Tokenizer.from_str(vocabulary()), tokenizer_lib.END
  )
  config = schema.DataConfig(path=str(path), stream="false", holdout_every=2)
  texts = list(sources.load(config, cache).train["text"])
  found = [encoder_.encode(texts), encoder_.measure(texts)]
  if path.suffix != ".txt":
    task = TASKS["classify"].with_columns("text", "", "label", ())
    found.append(examples_lib.digest(examples_lib.load(task, config, cache)))
  return digest(found)


READERS = {
  "llama": Reader(
    make_llama,
    read_llama,
    typed=(
      "config.json",
      "generation_config.json",
      "tokenizer_config.json",
      checkpoint_folder.INDEX,
    ),
  ),
  "bert": Reader(
    make_bert, read_encoder, typed=("config.json", "tokenizer_config.json")
  ),
  "roberta": Reader(
    make_roberta, read_encoder, typed=("config.json", "tokenizer_config.json")
  ),
  "gguf": Reader(make_gguf, read_gguf),
  "run": Reader(make_run_folder, read_run, typed=("config.json", "text.json")),
  "checkpoint": Reader(
    make_checkpoint,
    read_checkpoint,
    typed=("config.json", "text.json"),
    guarded=("checkpoints/",),
  ),
  "tokenizer": Reader(
    make_tokenizer, read_tokenizer, typed=("tokenizer_config.json",)
  ),
  "sentencepiece": Reader(make_sentencepiece, read_sentencepiece),
  "data": Reader(make_data, read_data),
}
assert TINY.vocab_size == MODEL.vocab_size  # of the same tokenizer
