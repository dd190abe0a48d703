"""The command line of `python -m train.pretrain`."""

import argparse
import pathlib

from train.config import field_help, presets
from train.methods import registry


def folder(text: str) -> pathlib.Path:
  """A folder on this machine.

  Raises:
    argparse.ArgumentTypeError: it is the address of a bucket.
  """
  if "://" in text:
    raise argparse.ArgumentTypeError(
      f"{text} is an address, but runs are written to folders; mount it and"
      " give the folder"
    )
  return pathlib.Path(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m train.pretrain",
    description="Pre-trains a LLaMA with GaLore or another optimizer.",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="presets:\n"
    + presets.summary()
    + "\n\noptimizers:\n"
    + registry.summary()
    + "\n\nfields for --set, with their values in the default run and, in"
    " parentheses,\ntheir types or choices:\n\n"
    + field_help.summary(presets.make("sotu_small", "galore")),
  )
  _add_training_flags(parser)
  _add_output_flags(parser)
  flags = parser.parse_args(argv)
  if flags.layerwise:
    flags.settings.insert(0, "train.layerwise=true")
  if flags.json and not flags.dry_run:
    parser.error("--json needs --dry-run")
  return flags


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags for what is trained, and how."""
  add = parser.add_argument
  add(
    "--preset",
    default="sotu_small",
    metavar="NAME",
    help="one of the presets below; default: sotu_small",
  )
  add(
    "--optimizer",
    default="galore",
    metavar="NAME",
    help="one of the optimizers below; default: galore",
  )
  add(
    "--from",
    type=pathlib.Path,
    dest="source",
    metavar="FOLDER",
    help="start from these weights: LLaMA safetensors, or another run",
  )
  add(
    "--layerwise",
    action="store_true",
    help="update each layer inside the backward pass (train.layerwise=true)",
  )
  add(
    "--lean",
    action="store_true",
    help="compute gradients at rank r and never whole: faster, less memory, no"
    " residual (train.lean=true)",
  )
  add(
    "--set",
    action="append",
    default=[],
    dest="settings",
    metavar="GROUP.FIELD=VALUE",
    help="change one field of the preset; may be repeated",
  )


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags for the output folder and the dry run."""
  add = parser.add_argument
  add(
    "--out",
    type=folder,
    help="folder of the run; default: runs/PRESET-OPTIMIZER",
  )
  add("--overwrite", action="store_true", help="delete an earlier run in --out")
  add(
    "--dry-run",
    action="store_true",
    help="only count the bytes and FLOPs that the run would take",
  )
  add("--json", action="store_true", help="with --dry-run: one JSON object")
