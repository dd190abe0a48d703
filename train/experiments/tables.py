"""The tables of the evidence page, as plain data.

A table compares variants: methods with the settings that define them. All
variants of a table share model, text, batches and the search for a learning
rate. The length of a run is given by `--tokens`.
"""

from train.experiments import length_tables
from train.experiments.table import SearchRange, Settings, Table, Variant

# Changes to the preset that make a LLaMA of 3.4M parameters, 2.4M of them in
# the matrices of its blocks.
PRESET = "sotu_small"
MODEL: Settings = (
  "model.d_model=256",
  "model.d_ff=688",
  "model.n_layers=3",
  "model.n_heads=4",
  "model.unroll=3",
  "optimizer.rank=64",
  "optimizer.scale=1",
)
# For `quick`, which only shows that the runner works.
TINY: Settings = (
  "model.vocab_size=512",
  "model.d_model=64",
  "model.d_ff=176",
  "model.n_layers=2",
  "model.n_heads=2",
  "model.unroll=2",
  "data.length=64",
  "optimizer.rank=16",
  "optimizer.scale=1",
)
TOKENS = 1_000_000
SEEDS = (0, 1, 2)


RATES = SearchRange(3.2e-2, 1e-3, 1.28e-1)
TUNED = 3.2e-2  # the rate chosen for GaLore in `methods`
MULTIPLIERS = SearchRange(1 / 16, 1 / 1024, 4.0)
EVERY_STEP = 10**6  # more gaps than steps: a gap is at least one step


BASELINE = Variant("adamw", "AdamW, full rank", "adamw")
OURS = Variant("galore", "GaLore, defaults of 0.1", "galore")
FAITHFUL = Variant("galore_faithful", "GaLore, as published", "galore_faithful")

METHODS = Table(
  "methods",
  "Methods",
  (
    (
      BASELINE,
      OURS,
    ),
    (
      FAITHFUL,
      # Its alpha is not only a multiplier: it does not scale the residual.
      Variant("fira", "Fira", "fira", ("optimizer.scale=0.25",)),
      Variant("galore_8bit", "8-bit GaLore", "galore_8bit"),
      Variant("contrib_galore", "optax.contrib.galore", "contrib_galore"),
      Variant("lora", "LoRA", "lora"),
      Variant("relora", "ReLoRA, no warm start", "relora"),
      Variant("low_rank", "Low-Rank", "low_rank"),
    ),
    (
      Variant("apollo", "APOLLO", "apollo"),
      Variant(
        "apollo_mini", "APOLLO-Mini", "apollo_mini", ("optimizer.scale=128",)
      ),
      Variant("q_galore", "Q-GaLore, 8-bit weights", "q_galore"),
      Variant("adamw_8bit", "8-bit AdamW, full rank", "adamw_8bit"),
      Variant("muon", "Muon, full rank", "muon"),
      Variant("adafactor", "Adafactor, full rank", "adafactor"),
      Variant(
        "galore_adafactor", "GaLore around Adafactor", "galore_adafactor"
      ),
      Variant("sumo", "SUMO: GaLore around an exact Muon", "sumo"),
    ),
    (
      Variant(
        "ldadam_moments",
        "GaLore, moments rotated as in LDAdam",
        "galore",
        ("optimizer.moments=ldadam",),
      ),
      Variant(
        "ldadam",
        "LDAdam: new bases at every step",
        "ldadam",
        ("optimizer.update_proj_gap=1",),
      ),
      Variant("golore", "GoLore: random bases from half of the run", "golore"),
      # Its momentum starts from zero in each period, so that periods are long.
      Variant("gum", "GUM: SUMO without bias", "gum", gaps=2),
      Variant("fira_1", "Fira, alpha 1: all of the gradient", "fira"),
      Variant("adamw_b2", "AdamW, b2 = 0.95", "adamw", ("optimizer.b2=0.95",)),
    ),
  ),
  settings=MODEL,
  rates=RATES,
  multipliers=MULTIPLIERS,
  seeds=SEEDS,
  tokens=TOKENS,
)


def _change(name: str, label: str, *settings: str, gaps: int = 10) -> Variant:
  """GaLore with the defaults of 0.1, except for these settings."""
  fields = tuple(f"optimizer.{s}" if "." not in s else s for s in settings)
  return Variant(name, label, "galore", fields, gaps)


RANKS = (1, 4, 16, 64, 128)
RANK_VARIANTS = tuple(
  _change(f"rank_{rank}", f"rank {rank}", f"optimizer.rank={rank}")
  for rank in RANKS
)

ABLATIONS = Table(
  "ablations",
  "Ablations of GaLore with the defaults of 0.1",
  (
    (
      OURS,
      *(e for e in RANK_VARIANTS if e.name != "rank_64"),
      # Stands for full rank, at which a basis would save no memory.
      BASELINE,
      _change("every_step", "a basis at every step", gaps=EVERY_STEP),
      _change("gaps_50", "50 to 60 bases in a run", gaps=50),
      _change("gaps_2", "2 bases in a run, not 10", gaps=2),
    ),
    (
      _change("synchronous", "all bases in one step", "refresh=synchronous"),
      _change("keep", "moments kept at a refresh", "moments=keep"),
      _change("reset", "moments zeroed at a refresh", "moments=reset"),
      _change("auto", "sides of the smallest state", "proj_type=auto"),
      _change("svd", "bases by exact SVD", "projector=svd"),
    ),
    (
      _change("basis_int8", "bases in 8 bits", "basis_dtype=int8"),
      _change("basis_int4", "bases in 4 bits", "basis_dtype=int4"),
      Variant("moments_8bit", "moments in 8 bits", "galore_8bit"),
      _change(
        "weights_int8",
        "8-bit weights, stochastic rounding",
        "model.weights=int8",
      ),
      _change(
        "weights_int8_nearest",
        "8-bit weights, rounded to nearest",
        "model.weights=int8",
        "train.rounding=nearest",
      ),
      _change("reverse_std", "longer side projected", "proj_type=reverse_std"),
      _change("full", "both sides projected", "proj_type=full"),
    ),
  ),
  settings=MODEL,
  rates=SearchRange(TUNED, TUNED, TUNED),
  multipliers=SearchRange(1 / 8, 1 / 256, 1.0),
  seeds=SEEDS,
  tokens=TOKENS,
  contenders=1,
)

# At the points that were chosen in `methods` with runs of 256k tokens. AdamW
# has no bases; its 60 gaps only make the keys of its runs differ from those of
# `methods`, which are evaluated less often.
LONG = Table(
  "long",
  "Many refreshes",
  (
    (
      BASELINE._replace(gaps=60, at=(6.4e-2, 1 / 64)),
      OURS._replace(label="GaLore, 60 gaps", gaps=60, at=(3.2e-2, 1 / 8)),
      Variant("galore_10", "GaLore, 10 gaps", "galore", at=(3.2e-2, 1 / 8)),
      Variant(
        "q_galore",
        "Q-GaLore, 8-bit weights, 60 gaps",
        "q_galore",
        gaps=60,
        at=(3.2e-2, 1 / 8),
      ),
    ),
  ),
  settings=MODEL,
  rates=RATES,
  multipliers=MULTIPLIERS,
  seeds=(0, 1),
  tokens=TOKENS,
  evaluations=30,
)

QUICK = Table(
  "quick",
  "Trial of the runner",
  ((BASELINE, OURS),),
  settings=TINY,
  rates=SearchRange(8e-3, 4e-3, 8e-3),
  multipliers=SearchRange(0.25, 0.25, 0.25),
  seeds=(0, 1),
  tokens=100_000,
)

TABLES = {
  table.name: table
  for table in (
    length_tables.LENGTH,
    length_tables.CHANGES,
    METHODS,
    ABLATIONS,
    LONG,
    QUICK,
  )
}
