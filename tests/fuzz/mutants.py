"""Makes damaged copies of a sound folder, each from a seed."""

import json
import os
import pathlib
import random
import shutil
from typing import Any, NamedTuple

# Values of every JSON type, and of numbers those at the edges.
OTHERS: tuple[Any, ...] = (
  "text", "", "\ud800", "a\0b", "../../etc/passwd", 7, -1, 0, 2**31, 2**63,
  10**30, 0.5, 1e308, float("nan"), float("inf"), True, False, None, [], [None],
  [[[]]], {}, {"x": None}, ["a", 1],
)  # fmt: skip
KINDS = {str: "text", bool: "flag", int: "number", float: "number"}


class Mutant(NamedTuple):
  """What was damaged."""

  file: str  # relative to the folder
  how: str


def copy(sound: pathlib.Path, folder: pathlib.Path) -> None:
  """Makes `folder` a copy of a sound one."""
  if folder.exists():
    shutil.rmtree(folder)
  shutil.copytree(sound, folder)


def make(sound: pathlib.Path, folder: pathlib.Path, seed: int) -> Mutant:
  """Copies a sound folder and damages one file of the copy."""
  copy(sound, folder)
  rng = random.Random(seed)
  files = sorted(p for p in folder.rglob("*") if p.is_file())
  path = rng.choice(files)
  if rng.random() < 0.06:
    how = rng.choice(sorted(WHOLE))
    WHOLE[how](path)
  elif path.suffix in FORMATS and rng.random() < 0.7:
    how = FORMATS[path.suffix](path, rng)
  else:
    how = rng.choice(sorted(BYTES))
    path.write_bytes(BYTES[how](bytearray(path.read_bytes()), rng))
  return Mutant(str(path.relative_to(folder)), how)


def _flip(content: bytearray, rng: random.Random) -> bytes:
  for _ in range(rng.choice((1, 1, 1, 4, 32))):
    if content:
      content[_place(content, rng)] ^= 1 << rng.randrange(8)
  return bytes(content)


def _place(content: bytearray, rng: random.Random) -> int:
  """A place in a file; half of them are in its header."""
  limit = min(len(content), 256) if rng.random() < 0.5 else len(content)
  return rng.randrange(limit)


def _cut(content: bytearray, rng: random.Random) -> bytes:
  return bytes(content[: rng.randrange(len(content) + 1)])


def _drop(content: bytearray, rng: random.Random) -> bytes:
  start = rng.randrange(len(content) + 1)
  return bytes(content[:start] + content[start + rng.randint(1, 40) :])


def _repeat(content: bytearray, rng: random.Random) -> bytes:
  start = rng.randrange(len(content) + 1)
  part = content[start : start + rng.randint(1, 40)]
  return bytes(content[:start] + part * rng.randint(1, 50) + content[start:])


def _fill(content: bytearray, rng: random.Random) -> bytes:
  """Overwrites a few bytes with a number at an edge."""
  width = rng.choice((1, 4, 8))
  value = rng.choice((0, 1, 255, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
  start = _place(content, rng) if content else 0
  number = (value % 256**width).to_bytes(width, "little")
  content[start : start + width] = number
  return bytes(content)


def _no_text(content: bytearray, rng: random.Random) -> bytes:
  start = rng.randrange(len(content) + 1)
  content[start:start] = rng.choice((b"\xff", b"\xed\xa0\x80", b"\xc3", b"\0"))
  return bytes(content)


BYTES = {
  "cut": _cut,
  "drop": _drop,
  "fill": _fill,
  "flip": _flip,
  "no text": _no_text,
  "repeat": _repeat,
}


def _folder(path: pathlib.Path) -> None:
  path.unlink()
  path.mkdir()


def _link(path: pathlib.Path) -> None:
  path.unlink()
  path.symlink_to(path)  # leads to itself


def _pipe(path: pathlib.Path) -> None:
  path.unlink()
  os.mkfifo(path)


WHOLE = {
  "empty": lambda path: path.write_bytes(b""),
  "folder": _folder,
  "link": _link,
  "missing": pathlib.Path.unlink,
  "pipe": _pipe,
}


def _change_json(path: pathlib.Path, rng: random.Random) -> str:
  """Changes one value of a JSON file, or of one of its lines."""
  lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
  if path.suffix == ".json":
    lines = ["".join(lines)]
  index = rng.randrange(len(lines))
  content = json.loads(lines[index])
  how = _change(content, rng)
  lines[index] = json.dumps(content) + "\n"
  path.write_text("".join(lines), encoding="utf-8")
  return how


def _change_header(path: pathlib.Path, rng: random.Random) -> str:
  """Changes one value in the header of a safetensors file."""
  content = path.read_bytes()
  size = int.from_bytes(content[:8], "little")
  header = json.loads(content[8 : 8 + size])
  how = _change(header, rng)
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
  return f"{how} in the header"


# Types of GGUF whose values have four bytes: whole numbers, floats.
GGUF_TYPES = (4, 5, 6)


def _change_gguf(path: pathlib.Path, rng: random.Random) -> str:
  """Changes a number of the metadata, or its type to another of that size."""
  content = bytearray(path.read_bytes())
  keys = [
    b"embedding_length", b"feed_forward_length", b"block_count", b"freq_base",
    b"attention.head_count", b"head_count_kv", b"layer_norm_rms_epsilon",
    b"context_length", b"dimension_count", b"eos_token_id",
  ]  # fmt: skip
  key = rng.choice(keys)
  at = content.index(key) + len(key)
  if rng.random() < 0.5:
    content[at] = rng.choice([x for x in GGUF_TYPES if x != content[at]])
    how = "type"
  else:
    value = rng.choice((0, 1, 3, 2**16, 2**31 - 1, 2**32 - 1))
    content[at + 4 : at + 8] = value.to_bytes(4, "little")
    how = "value"
  path.write_bytes(content)
  return how


def _change_pieces(path: pathlib.Path, rng: random.Random) -> str:
  """Changes a part of a SentencePiece model."""
  from sentencepiece import sentencepiece_model_pb2 as pb2

  proto = pb2.ModelProto()
  proto.ParseFromString(path.read_bytes())
  piece = proto.pieces[rng.randrange(len(proto.pieces))]
  how = rng.choice(("text", "score", "type", "kind", "map", "removed"))
  if how == "text":
    piece.piece = rng.choice(
      ("", "▁we", "x" * 5000, "▁" * 4000, "<0x00>", "\0", "</s>")
    )
  elif how == "score":
    piece.score = rng.choice((float("nan"), float("inf"), -1e38, 1e38))
  elif how == "type":
    piece.type = rng.choice((1, 2, 3, 4, 5, 6))
  elif how == "kind":
    proto.trainer_spec.model_type = rng.choice((1, 2, 3, 4))
  elif how == "map":
    proto.normalizer_spec.precompiled_charsmap = rng.randbytes(
      rng.choice((1, 4, 64, 1024))
    )
  else:
    proto.pieces.remove(piece)
  path.write_bytes(proto.SerializeToString())
  return how


FORMATS = {
  ".json": _change_json,
  ".jsonl": _change_json,
  ".safetensors": _change_header,
  ".gguf": _change_gguf,
  ".model": _change_pieces,
}


def _change(content: Any, rng: random.Random) -> str:
  parent, key = _pick(content, rng)
  if isinstance(parent, dict) and rng.random() < 0.1:
    del parent[key]
    return "without a field"
  old, new = parent[key], rng.choice(OTHERS)
  parent[key] = new
  if new in (None, []) or old is None:  # both may stand for no value
    return "nothing"
  return "value" if kind_of(old) == kind_of(new) else "type"


def kind_of(value: Any) -> str:
  """The type of a value in JSON."""
  return KINDS.get(type(value), type(value).__name__)


def _pick(content: Any, rng: random.Random) -> tuple[Any, Any]:
  """A container and a key in it, at any depth."""
  while True:
    keys = list(content) if isinstance(content, dict) else range(len(content))
    key = rng.choice(keys)
    inner = content[key]
    if not isinstance(inner, dict | list) or not inner or rng.random() < 0.2:
      return content, key
    content = inner
