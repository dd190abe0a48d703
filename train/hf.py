"""Weights in and out: `python -m train.hf import SRC --out DIR` and `export`.

`import` reads LLaMA safetensors (one file or shards) or a GGUF file; `export`
reads a run. Both write a folder in Hugging Face's layout: model.safetensors,
config.json, generation_config.json, tokenizer.json, tokenizer_config.json.
`transformers` loads it, and so do `train.pretrain --from` and `train.sample`.
"""

import argparse
import pathlib
import sys

import numpy as np

from train.common.errors import UserError
from train.pretrained import llama_checkpoint


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m train.hf",
    description="Reads and writes LLaMA weights in Hugging Face's layout.",
  )
  commands = parser.add_subparsers(dest="command", required=True)
  reader = commands.add_parser(
    "import", help="a folder of safetensors or a .gguf file"
  )
  reader.add_argument("source", type=pathlib.Path, metavar="SRC")
  writer = commands.add_parser("export", help="a run of train.pretrain")
  writer.add_argument("source", type=pathlib.Path, metavar="RUN")
  writer.add_argument(
    "--step", type=int, default=0, help="checkpoint; default: the newest"
  )
  for command in (reader, writer):
    command.add_argument(
      "--out", type=pathlib.Path, required=True, metavar="DIR"
    )
    command.add_argument(
      "--dtype",
      choices=("float32", "bfloat16"),
      default="",
      help="of the tensors; default: as they are",
    )
  return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
  """The command: 0 done, 2 wrong input."""
  flags = parse_arguments(words)
  try:
    weights = llama_checkpoint.load(flags.source, getattr(flags, "step", 0))
    llama_checkpoint.save(weights, flags.out, flags.dtype)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  count = sum(int(np.prod(shape)) for shape in weights.shapes.values())
  print(f"{flags.out}: {count:,} parameters from {weights.source}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
