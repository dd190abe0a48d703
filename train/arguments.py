"""The command line of `python -m train.pretrain`."""

import argparse
import pathlib

from train import config as configs
from train import notes, presets


def parse(words: list[str] | None) -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m train.pretrain",
    description="Pre-trains a LLaMA with GaLore or one of its peers.",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="presets:\n"
    + presets.summary()
    + "\n\nfields for --set, with their values in the default run:\n"
    + notes.summary(presets.make("sotu_small", "galore")),
  )
  parser.add_argument(
    "--preset",
    default="sotu_small",
    metavar="NAME",
    help="one of the presets below; default: sotu_small",
  )
  parser.add_argument(
    "--optimizer",
    default="galore",
    metavar="NAME",
    help=", ".join(configs.OPTIMIZERS) + "; default: galore",
  )
  parser.add_argument(
    "--from",
    type=pathlib.Path,
    dest="source",
    metavar="FOLDER",
    help="go on from these weights: LLaMA safetensors, or another run",
  )
  parser.add_argument(
    "--layerwise",
    action="store_true",
    help="update each layer inside the backward pass (train.layerwise=true)",
  )
  parser.add_argument(
    "--set",
    action="append",
    default=[],
    dest="settings",
    metavar="GROUP.FIELD=VALUE",
    help="changes one field of the preset; may be repeated",
  )
  parser.add_argument(
    "--out", type=pathlib.Path, help="default: runs/PRESET-OPTIMIZER"
  )
  parser.add_argument(
    "--overwrite", action="store_true", help="delete an earlier run in --out"
  )
  parser.add_argument(
    "--dry-run",
    action="store_true",
    help="only count what the run would take: bytes, FLOPs",
  )
  parser.add_argument(
    "--json", action="store_true", help="with --dry-run: one JSON object"
  )
  flags = parser.parse_args(words)
  if flags.layerwise:
    flags.settings.insert(0, "train.layerwise=true")
  if flags.json and not flags.dry_run:
    parser.error("--json goes with --dry-run")
  return flags
