"""The tables at length: runs of twenty tokens a parameter and more.

A variant names all settings that define its method, so that a later change of
a default does not change what a record stands for.
"""

from train.experiments.table import SearchRange, Settings, Table, Variant

# A LLaMA of 0.22M parameters, 0.15M of them in the matrices of its blocks,
# which two cores train on twenty tokens a parameter in two minutes.
MODEL: Settings = (
  "model.vocab_size=512",
  "model.d_model=64",
  "model.d_ff=176",
  "model.n_layers=3",
  "model.n_heads=2",
  "model.unroll=3",
  "data.length=128",
  "data.batch=16",
  "optimizer.scale=1",
)
TOKENS = 4_350_000  # twenty a parameter
QUARTER, SIXTEENTH = 16, 4  # ranks: d / 4 and d / 16

# How bases move in today's methods, and in those with the residual.
MOVING: Settings = ("optimizer.refresh=staggered", "optimizer.moments=rotate")
RESTING: Settings = (*MOVING, "optimizer.burst=4")
# How fast the norm of the residual may grow.
LIMITED: Settings = ("optimizer.residual_growth=1.01",)
# What leaves a third, or a twelfth, of AdamW's bytes.
INT4: Settings = ("optimizer.basis_dtype=int4",)


def residual(
  kind: str = "normalized", factor: float = 1, decay: float = 0.95
) -> Settings:
  """The residual's settings, in full."""
  return (
    f"optimizer.residual={kind}",
    f"optimizer.residual_factor={factor:g}",
    f"optimizer.residual_decay={decay:g}",
  )


def method(
  name: str,
  label: str,
  optimizer: str,
  *settings: str,
  rank: int = QUARTER,
  gaps: int = 10,
) -> Variant:
  """A variant at a rank."""
  return Variant(
    name, label, optimizer, (f"optimizer.rank={rank}", *settings), gaps
  )


def ours(name: str, label: str, *settings: str, rank: int = QUARTER, **fields):
  """GaLore with resting bases and the residual, by column."""
  changed = {s.partition("=")[0] for s in settings}
  defaults = [*RESTING, *residual(), "optimizer.b2=0.999"]
  kept = [s for s in defaults if s.partition("=")[0] not in changed]
  return method(name, label, "galore", *kept, *settings, rank=rank, **fields)


def low_bits(name: str, label: str, rank: int, *settings: str) -> Variant:
  """The same at a rank with moments in 8 bits and bases in 4."""
  settings = (*RESTING, *residual(), *INT4, "optimizer.b2=0.999", *settings)
  return method(name, label, "galore_8bit", *settings, rank=rank)


ADAMW = method("adamw", "AdamW", "adamw", "optimizer.b2=0.999")
OURS = ours("ours", "GaLore with the residual, rank d/4")
OURS_LOW = ours(
  "ours_16", "GaLore with the residual, rank d/16", rank=SIXTEENTH
)
LIMITED_ROWS = (
  low_bits(
    "limited_16_8bit",
    "8-bit GaLore, the residual limited, rank d/16",
    SIXTEENTH,
    *LIMITED,
  ),
  low_bits(
    "limited_8bit",
    "8-bit GaLore, the residual limited, rank d/4",
    QUARTER,
    *LIMITED,
  ),
)

LENGTH = Table(
  "length",
  "Methods at length",
  (
    (ADAMW, OURS),
    (OURS_LOW, method("muon", "Muon", "muon")),
    LIMITED_ROWS,
    (
      ours(
        "limited_16",
        "GaLore, the residual limited, rank d/16",
        *LIMITED,
        rank=4,
      ),
      ours("limited", "GaLore, the residual limited, rank d/4", *LIMITED),
    ),
    (
      method(
        "galore",
        "GaLore of 0.1, no residual",
        "galore",
        *MOVING,
        "optimizer.b2=0.999",
      ),
    ),
    (low_bits("ours_16_8bit", "8-bit GaLore with the residual, rank d/16", 4),),
    (
      method(
        "muon_4bit", "Muon, 4-bit momentum", "muon_4bit", "optimizer.b2=0.999"
      ),
      low_bits("ours_8bit", "8-bit GaLore with the residual, rank d/4", 16),
    ),
    (method("racs", "RACS", "racs", "optimizer.b2=0.999"),),
    (
      method(
        "muon_8bit", "Muon, 8-bit momentum", "muon_8bit", "optimizer.b2=0.999"
      ),
      method(
        "scale", "SCALE", "scale", "optimizer.b1=0.9", "optimizer.b2=0.999"
      ),
      method("foam", "FOAM", "foam", "optimizer.b1=0.9", "optimizer.b2=0.999"),
      method(
        "alice", "Alice", "alice", "optimizer.b1=0.9", "optimizer.b2=0.999"
      ),
      method("adamw_8bit", "8-bit AdamW", "adamw_8bit", "optimizer.b2=0.999"),
      method("adamw_b2", "AdamW, b2 = 0.95", "adamw", "optimizer.b2=0.95"),
    ),
    (
      method(
        "galore_faithful", "GaLore, as published", "galore_faithful", *MOVING
      ),
      method("fira", "Fira", "fira", *MOVING, "optimizer.b2=0.999"),
      method("apollo", "APOLLO", "apollo", "optimizer.b2=0.999"),
      method("lion", "Lion", "lion"),
      method("adafactor", "Adafactor", "adafactor"),
      method("lora", "LoRA", "lora", "optimizer.b2=0.999"),
      method("ldadam", "LDAdam", "ldadam", "optimizer.update_proj_gap=1"),
    ),
  ),
  settings=MODEL,
  rates=SearchRange(1.6e-2, 2.5e-4, 2.56e-1),
  multipliers=SearchRange(1 / 8, 1 / 256, 4.0),
  seeds=(0, 1, 2),
  tokens=TOKENS,
  contenders=1,
  text="reviews",
  other="speeches",
)

# One change each, from GaLore with the residual at rank d/4.
CHANGES = Table(
  "changes",
  "One change each, at length",
  (
    (
      OURS,
      ours("factored", "factored residual", *residual("factored")),
      ours("b2", "b2 = 0.95", "optimizer.b2=0.95"),
      ours("factor_half", "half the residual", *residual(factor=0.5)),
      ours("factor_2", "twice the residual", *residual(factor=2)),
      ours("gaps_40", "40 bases in a run", gaps=40),
      ours("gaps_3", "3 bases in a run", gaps=3),
    ),
    (
      ours("burst_1", "one iteration a refresh", "optimizer.burst=1"),
      ours("burst_8", "eight iterations a refresh", "optimizer.burst=8"),
      ours("at_once", "a refresh in one step", "optimizer.burst=0"),
      ours("keep", "moments kept", "optimizer.moments=keep"),
      ours(
        "ldadam_moments", "moments as in LDAdam", "optimizer.moments=ldadam"
      ),
      ours("rank_1", "rank 1", rank=1),
      ours("rank_32", "rank d/2", rank=32),
      ours("decay_99", "the residual's decay 0.99", *residual(decay=0.99)),
      ours(
        "both",
        "factored, b2 = 0.95",
        *residual("factored"),
        "optimizer.b2=0.95",
      ),
    ),
  ),
  settings=MODEL,
  rates=SearchRange(1.6e-2, 1.6e-2, 1.6e-2),
  multipliers=SearchRange(1 / 8, 1 / 256, 4.0),
  seeds=(0,),
  tokens=TOKENS,
  contenders=1,
  text="reviews",
  other="speeches",
)
