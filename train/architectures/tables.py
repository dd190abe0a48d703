"""The comparison that each architecture gets, as a table of `experiments`.

The search is that of `train.experiments`: learning rate and multiplier until
the best point has a worse one on all four sides, on the first seed, by the
validation loss. The best point then gets the other seeds.
"""

import dataclasses

from train.architectures.catalog import Entry
from train.experiments.table import SearchRange, Table, Variant

ADAMW = Variant("adamw", "AdamW", "adamw")
GALORE = Variant("galore", "GaLore", "galore")
# A convolution kernel as one matrix; without a rule it is nine.
ONE_MATRIX = Variant(
  "galore_one_matrix", "GaLore, one matrix a kernel", "galore_one_matrix"
)
# A convolution kernel as a tensor, with a factor for inputs and for outputs.
TUCKER = Variant("galore_tucker", "GaLore, Tucker factors", "galore_tucker")
# Groups of variants of one architecture.
EXTRA = {"cnn": ((ONE_MATRIX,), (TUCKER,)), "diffusion": ((ONE_MATRIX,),)}
RATES = SearchRange(1e-2, 3e-4, 0.11, factor=10**0.5)
MULTIPLIERS = SearchRange(0.5, 1 / 128, 8.0, factor=4.0)
SEEDS = (0, 1, 2)


def table(entry: Entry) -> Table:
  """The runs of an architecture, at the sizes of its file."""
  config = entry.module().Config()
  sizes = dataclasses.asdict(config)
  return Table(
    entry.name,
    entry.title,
    ((ADAMW, GALORE), *EXTRA.get(entry.name, ())),
    settings=tuple(f"{entry.name}.{k}={v}" for k, v in sizes.items()),
    rates=RATES,
    multipliers=MULTIPLIERS,
    seeds=SEEDS,
    tokens=config.steps * config.batch * sizes.get("length", 1),
    contenders=1,
    text=entry.data,
  )
