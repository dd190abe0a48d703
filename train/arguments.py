"""The command line of `python -m train.pretrain`."""

import argparse
import pathlib

from train import config as configs
from train import presets


def parse(words: list[str] | None) -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m train.pretrain",
    description="Pre-trains a LLaMA with GaLore or one of its peers.",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="presets:\n"
    + presets.summary()
    + "\n\nfields for --set:\n"
    + configs.summary(presets.make("sotu_small", "galore")),
  )
  parser.add_argument("--preset", default="sotu_small", metavar="NAME")
  parser.add_argument(
    "--optimizer",
    default="galore",
    metavar="NAME",
    help=", ".join(configs.OPTIMIZERS),
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
  return parser.parse_args(words)
