"""What is compared: the tables, as plain data.

A table is a list of entries, each a method with the settings that make it what
it is. All of a table share model, text, batches and the search for a learning
rate. Nothing here says how long a run is: that is one number, `--tokens`.
"""

from typing import NamedTuple

Settings = tuple[str, ...]

# A LLaMA of 3.4M parameters, 2.4M of them in the matrices of its blocks, on
# top of the preset `sotu_small`.
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
# For `quick`, which shows that the runner works and nothing else.
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


class Line(NamedTuple):
  """Numbers that are searched from `start` on, each a factor from the next."""

  start: float
  low: float
  high: float
  factor: float = 2.0

  def values(self) -> list[float]:
    """All of them, from the lowest."""
    found = [self.start]
    while found[0] / self.factor >= self.low:
      found.insert(0, found[0] / self.factor)
    while found[-1] * self.factor <= self.high:
      found.append(found[-1] * self.factor)
    return found


RATES = Line(3.2e-2, 1e-3, 1.28e-1)
TUNED = 3.2e-2  # what GaLore has come to in `methods`
MULTIPLIERS = Line(1 / 16, 1 / 1024, 4.0)
EVERY_STEP = 10**6  # more bases than steps: a gap is one step at least


class Entry(NamedTuple):
  """A row of a table."""

  name: str
  label: str
  optimizer: str
  settings: Settings = ()
  gaps: int = 10  # bases of a matrix (cycles of ReLoRA: half) in a run, about
  # Learning rate and multiplier, where they are not searched.
  at: tuple[float, float] | None = None


class Table(NamedTuple):
  """Entries that are compared with each other."""

  name: str
  title: str
  groups: tuple[tuple[Entry, ...], ...]  # the more telling comparisons first
  settings: Settings = MODEL
  rates: Line = RATES
  multipliers: Line = MULTIPLIERS
  seeds: tuple[int, ...] = SEEDS
  tokens: int = TOKENS
  evaluations: int = 2  # of the validation text in a run
  near: int = 3  # points at most that all seeds decide between

  @property
  def is_long(self) -> bool:
    """Whether how a run went matters, and not only where it ended."""
    return self.evaluations > 2

  @property
  def entries(self) -> tuple[Entry, ...]:
    """All rows, in the order of their groups."""
    return tuple(entry for group in self.groups for entry in group)


BASELINE = Entry("adamw", "AdamW, full rank", "adamw")
OURS = Entry("galore", "GaLore, our defaults", "galore")
FAITHFUL = Entry("galore_faithful", "GaLore, as published", "galore_faithful")

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
      # Its published alpha is more than a multiplier: the residual has none.
      Entry("fira", "Fira", "fira", ("optimizer.scale=0.25",)),
      Entry("galore_8bit", "8-bit GaLore", "galore_8bit"),
      Entry("contrib_galore", "optax.contrib.galore", "contrib_galore"),
      Entry("lora", "LoRA", "lora"),
      Entry("relora", "ReLoRA, no warm start", "relora"),
      Entry("low_rank", "Low-Rank", "low_rank"),
    ),
    (
      Entry("apollo", "APOLLO", "apollo"),
      Entry(
        "apollo_mini", "APOLLO-Mini", "apollo_mini", ("optimizer.scale=128",)
      ),
      Entry("q_galore", "Q-GaLore, 8-bit weights", "q_galore"),
      Entry("adamw_8bit", "8-bit AdamW, full rank", "adamw_8bit"),
      Entry("muon", "Muon, full rank", "muon"),
      Entry("adafactor", "Adafactor, full rank", "adafactor"),
      Entry("galore_adafactor", "GaLore around Adafactor", "galore_adafactor"),
      Entry("sumo", "SUMO: GaLore around an exact Muon", "sumo"),
    ),
    (
      Entry(
        "ldadam_moments",
        "GaLore, moments carried over as LDAdam does",
        "galore",
        ("optimizer.moments=ldadam",),
      ),
      Entry(
        "ldadam",
        "LDAdam: bases anew at every step",
        "ldadam",
        ("optimizer.update_proj_gap=1",),
      ),
      Entry("golore", "GoLore: random bases from half of the run", "golore"),
      # Its momentum starts from zero with each period.
      Entry("gum", "GUM: SUMO without bias", "gum", gaps=2),
      Entry("fira_1", "Fira, alpha 1: all of the gradient", "fira"),
      Entry("adamw_b2", "AdamW, b2 = 0.95", "adamw", ("optimizer.b2=0.95",)),
    ),
  ),
)


def _change(name: str, label: str, *settings: str, gaps: int = 10) -> Entry:
  """GaLore with our defaults but for these settings."""
  whole = tuple(f"optimizer.{s}" if "." not in s else s for s in settings)
  return Entry(name, label, "galore", whole, gaps)


RANKS = (1, 4, 16, 64, 128)
RANK_ENTRIES = tuple(
  _change(f"rank_{rank}", f"rank {rank}", f"optimizer.rank={rank}")
  for rank in RANKS
)

ABLATIONS = Table(
  "ablations",
  "Ablations of GaLore with our defaults",
  (
    (
      OURS,
      *(e for e in RANK_ENTRIES if e.name != "rank_64"),
      # A basis of full rank would save nothing: nothing is projected then.
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
      Entry("moments_8bit", "moments in 8 bits", "galore_8bit"),
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
  rates=Line(TUNED, TUNED, TUNED),
  multipliers=Line(1 / 8, 1 / 256, 1.0),
  near=1,
)

# At the points that `methods` has come to in runs of 256k tokens. AdamW has no
# gap; told one, its runs are not those of `methods`, which look less often.
LONG = Table(
  "long",
  "Many refreshes",
  (
    (
      BASELINE._replace(gaps=60, at=(6.4e-2, 1 / 64)),
      OURS._replace(label="GaLore, 60 gaps", gaps=60, at=(3.2e-2, 1 / 8)),
      Entry("galore_10", "GaLore, 10 gaps", "galore", at=(3.2e-2, 1 / 8)),
      Entry(
        "q_galore",
        "Q-GaLore, 8-bit weights, 60 gaps",
        "q_galore",
        gaps=60,
        at=(3.2e-2, 1 / 8),
      ),
    ),
  ),
  seeds=(0, 1),
  evaluations=30,
)

QUICK = Table(
  "quick",
  "A trial of the runner",
  ((BASELINE, OURS),),
  settings=TINY,
  rates=Line(8e-3, 4e-3, 8e-3),
  multipliers=Line(0.25, 0.25, 0.25),
  seeds=(0, 1),
  tokens=100_000,
)

TABLES = {t.name: t for t in (METHODS, ABLATIONS, LONG, QUICK)}
