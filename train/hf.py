"""Converts LLaMA weights to the layout of Hugging Face.

    python -m train.hf import SRC --out DIR     # safetensors or a GGUF file
    python -m train.hf export RUN --out DIR     # a run of train.pretrain

Both write a folder with model.safetensors, config.json, generation_config.json,
tokenizer.json and tokenizer_config.json, which `transformers`,
`train.pretrain --from` and `train.sample` load.
"""

import argparse
import pathlib
import sys

import numpy as np

from train.common import commands
from train.pretrained import llama_checkpoint


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m train.hf",
    description="Converts LLaMA weights to the layout of Hugging Face.",
  )
  commands = parser.add_subparsers(dest="command", required=True)
  reader = commands.add_parser(
    "import", help="convert a folder of safetensors or a .gguf file"
  )
  reader.add_argument(
    "source",
    type=pathlib.Path,
    metavar="SRC",
    help="the folder or the .gguf file",
  )
  writer = commands.add_parser("export", help="convert a run of train.pretrain")
  writer.add_argument(
    "source", type=pathlib.Path, metavar="RUN", help="the folder of the run"
  )
  writer.add_argument(
    "--step",
    type=int,
    default=0,
    help="step of the checkpoint; default: the newest",
  )
  for command in (reader, writer):
    command.add_argument(
      "--out",
      type=pathlib.Path,
      required=True,
      metavar="DIR",
      help="a new or empty folder",
    )
    command.add_argument(
      "--dtype",
      choices=("float32", "bfloat16"),
      default="",
      help="dtype of the tensors; default: unchanged",
    )
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
  """Runs the command: 0 done, 2 wrong input, 130 interrupted."""
  flags = parse_arguments(argv)
  return commands.run(lambda: convert(flags))


def convert(flags: argparse.Namespace) -> None:
  """Reads weights, writes them in the other layout, and says so."""
  weights = llama_checkpoint.load(flags.source, getattr(flags, "step", 0))
  llama_checkpoint.save(weights, flags.out, flags.dtype)
  count = sum(int(np.prod(shape)) for shape in weights.shapes.values())
  print(f"{flags.out}: {count:,} parameters from {weights.source}")


if __name__ == "__main__":
  sys.exit(main())
