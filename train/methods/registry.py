"""The methods: one record each, which everything else asks.

A method is what `optimizer.name` and `--optimizer` choose. To add one, write
its transformation in `transforms.py` or `rivals/` and its record here.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import optax

from galore_optax import baselines
from train.common.errors import UserError
from train.methods import transforms
from train.methods.options import OptimizerConfig, SharedOptimizerConfig
from train.methods.rivals import alice, foam, quantized_muon, racs, scale

# Options, learning-rate schedule and shardings to the transformation.
Make = Callable[
  [OptimizerConfig, optax.Schedule, Any], optax.GradientTransformation
]
# Options and the keyword arguments that all factors share to the factors.
MakeFactors = Callable[..., baselines.LowRank]

_NOT_GALORE = "which is none of GaLore's methods"
# Of a method whose projections are random.
_RANDOM_IGNORES = {
  "residual": "which updates with whole gradients",
  "burst": "whose bases are random",
}
GALORE_RATE = 0.01  # of the published LLaMA runs of GaLore and its peers


@dataclasses.dataclass(frozen=True)
class Method:
  """What is known of a method.

  Attributes:
    name: what `optimizer.name` says.
    about: one line for `--help`.
    make: makes the transformation.
    projects: whether the block matrices are projected, by this library or
      by Optax.
    by_optax: whether Optax projects: what `galore_optax.describe` cannot see.
    accumulates: whether `optimizer.accumulate` applies: gradients are added up
      after the projection.
    lean: whether gradients at rank r are all that it needs.
    random_bases: whether projections are random, so that no basis is found.
    unwatchable: why its subspaces cannot be measured; "" if they can.
    random_late: whether bases are random from half of the run on.
    around_adam: whether `optimizer.moments=ldadam` applies.
    published: whether it is the paper's algorithm: an exact SVD of all matrices
      at once, and moments as they are.
    iterations: of subspace iteration at a refresh.
    factors: makes the factors that are trained in place of the matrices.
    restarts: whether the factors are merged and restarted.
    one_layer: whether it can update one layer without the others; if not, why.
    ignores: options that it would ignore, and why. They must keep their
      defaults, or be called as the method is.
    small: options at the size of the preset `sotu_small`.
    frequent: whether it gains from more bases than ten in a short run.
    llama_rate: learning rate of the LLaMA presets.
    llama_scale: `optimizer.scale` of the LLaMA presets.
    options: options that differ from the defaults in every preset.
    fine_tuning: options that differ from a fine-tuning recipe's.
    weights: how the block matrices are stored in every preset.
  """

  name: str
  about: str
  make: Make
  projects: bool = False
  by_optax: bool = False
  accumulates: bool = False
  lean: bool = False
  random_bases: bool = False
  unwatchable: str = ""
  random_late: bool = False
  around_adam: bool = False
  published: bool = False
  iterations: int = 2
  factors: MakeFactors | None = None
  restarts: bool = False
  one_layer: str = ""
  ignores: Mapping[str, str] = dataclasses.field(default_factory=dict)
  small: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  frequent: bool = False
  llama_rate: float = 1e-3
  llama_scale: float = 0.25
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  fine_tuning: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  weights: str = "full"

  def steps_together(self, refresh: str) -> bool:
    """Whether all matrices are refreshed at the same step."""
    return self.published or refresh == "synchronous"

  def check(self, options: SharedOptimizerConfig) -> None:
    """Raises a UserError for options that the method would ignore."""
    reasons = dict(self.ignores)
    if self.by_optax or not self.projects:
      reasons |= dict.fromkeys(("residual", "burst"), _NOT_GALORE)
    for field in dataclasses.fields(options):
      value = getattr(options, field.name)
      if field.name not in reasons or value in (field.default, self.name):
        continue
      text = (
        f"optimizer.{field.name}={value} has no meaning for"
        f" optimizer.name={self.name}, {reasons[field.name]}; leave it at"
        f" {field.default}"
      )
      if field.name == "residual":  # a preset may have set it
        text += f", or choose the method with --optimizer {self.name}"
      raise UserError(text)
    if options.moments == "ldadam" and not self.around_adam:
      raise UserError(
        "optimizer.moments=ldadam is for AdamW in a subspace, not for"
        f" optimizer.name={self.name}; use galore or fira, or"
        " optimizer.moments=rotate"
      )


def _lora(c: OptimizerConfig, **shared: Any) -> baselines.LowRank:
  return baselines.lora(c.rank, alpha=c.lora_alpha, **shared)


def _qlora(c: OptimizerConfig, **shared: Any) -> baselines.LowRank:
  return baselines.qlora(c.rank, alpha=c.lora_alpha, **shared)


def _relora(c: OptimizerConfig, **shared: Any) -> baselines.LowRank:
  return baselines.relora(c.rank, alpha=c.lora_alpha, pruned=c.pruned, **shared)


def _low_rank(c: OptimizerConfig, **shared: Any) -> baselines.LowRank:
  return baselines.low_rank(c.rank, **shared)


def _galore(
  name: str, about: str, make: Make, *, lean: bool = True, **facts: Any
) -> Method:
  """A record of GaLore around another optimizer."""
  return Method(
    name,
    about,
    make,
    projects=True,
    accumulates=True,
    lean=lean,
    llama_rate=GALORE_RATE,
    **facts,
  )


def _factors(name: str, about: str, factors: MakeFactors, **facts: Any):
  """A record of a method that trains factors in place of the matrices."""
  return Method(
    name,
    about,
    transforms.adamw,
    factors=factors,
    one_layer="trains factors instead; use a GaLore method",
    small={"learning_rate": 8e-3},
    **facts,
  )


# Options at the size of `sotu_small`: AdamW's, and those of GaLore's methods.
_SMALL_ADAMW = {"learning_rate": 8e-3, "matrix_lr": 0.125}
_SMALL_GALORE = {"learning_rate": 8e-3, "scale": 0.25}
# With the residual, all of the gradient moves the weights, as AdamW's does. So
# they take the same factor.
_SMALL_RESIDUAL = {
  "learning_rate": 8e-3,
  "scale": 0.125,
  "residual": "normalized",
}
_RANDOM = "random projections are not made to fit the gradients"

_RECORDS = (
  Method("adamw", "AdamW", transforms.adamw, small=_SMALL_ADAMW),
  Method(
    "adafactor",
    "Adafactor with a first moment",
    transforms.adafactor,
    small=_SMALL_ADAMW,
  ),
  Method(
    "lion",
    "Lion",
    transforms.lion,
    small={"learning_rate": 1e-3, "matrix_lr": 0.125},
  ),
  Method(
    "sgd", "SGD with momentum", transforms.sgd, small={"learning_rate": 0.5}
  ),
  Method("muon", "Muon", transforms.muon, small={"learning_rate": 1e-2}),
  Method(
    "muon_8bit",
    "Muon with momentum in 8 bits",
    quantized_muon.muon_8bit,
    small={"learning_rate": 1e-2},
  ),
  Method(
    "muon_4bit",
    "Muon with momentum in 4 bits",
    quantized_muon.muon_4bit,
    small={"learning_rate": 1e-2},
  ),
  # The rates of this and the other rivals are AdamW's or the papers', and not
  # tuned.
  Method(
    "scale",
    "SCALE: SGD with normalized columns",
    scale.scale,
    one_layer="divides whole columns of the embedding; use racs",
    small=_SMALL_ADAMW,
  ),
  Method(
    "racs",
    "RACS: SGD with scaled rows and columns",
    racs.racs,
    small={"learning_rate": 8e-3, "scale": 0.125},
    llama_rate=0.02,
    llama_scale=0.05,
  ),
  Method(
    "alice",
    "Alice: Adam in a subspace that switches, and the rest",
    alice.alice,
    small=_SMALL_GALORE,
    llama_rate=0.02,
    llama_scale=0.3,
  ),
  Method(
    "foam",
    "FOAM: Adam with moments of blocks of four",
    foam.foam,
    small=_SMALL_GALORE,
    llama_rate=GALORE_RATE,
  ),
  Method(
    "contrib_galore",
    "optax.contrib.galore around Adam",
    transforms.contrib_galore,
    projects=True,
    by_optax=True,
    unwatchable="optax.contrib.galore does not keep its bases by name",
    small=_SMALL_GALORE,
    llama_rate=GALORE_RATE,
  ),
  _galore(
    "galore",
    "GaLore around AdamW",
    transforms.galore,
    around_adam=True,
    small=_SMALL_RESIDUAL,
    frequent=True,
  ),
  _galore(
    "galore_faithful",
    "GaLore exactly as published: by SVD, all matrices at once",
    transforms.galore_faithful,
    published=True,
    lean=False,
    ignores={"burst": "whose bases are exact"},
    small=_SMALL_GALORE,
  ),
  _galore(
    "galore_adafactor",
    "GaLore around Adafactor",
    transforms.galore_adafactor,
    small=_SMALL_GALORE,
  ),
  _galore(
    "galore_lion",
    "GaLore around Lion",
    transforms.galore_lion,
    small={"learning_rate": 1e-3, "scale": 0.25},
  ),
  _galore(
    "galore_sgd",
    "GaLore around SGD with momentum",
    transforms.galore_sgd,
    small={"learning_rate": 0.5, "scale": 1.0},
  ),
  _galore(
    "golore",
    "GaLore whose bases are random from half of the run on",
    transforms.golore,
    random_late=True,
    lean=False,
    ignores={"burst": "whose bases are random late in the run"},
    small=_SMALL_GALORE,
  ),
  Method(
    "adamw_8bit",
    "AdamW with moments in 8 bits",
    transforms.adamw_8bit,
    small=_SMALL_GALORE,
  ),
  _galore(
    "galore_8bit",
    "GaLore with moments in 8 bits",
    transforms.galore_8bit,
    small=_SMALL_RESIDUAL,
    frequent=True,
  ),
  _galore(
    "q_galore",
    "Q-GaLore: weights and moments in 8 bits, bases in 4",
    transforms.q_galore,
    small=_SMALL_RESIDUAL,
    frequent=True,
    ignores={"burst": "whose refreshes are adaptive; take galore_8bit"},
    # Its scripts have a shorter second moment; all others take 0.999.
    options={"b2": 0.95},
    weights="int8",
  ),
  # Fira's residual is not scaled by alpha, and APOLLO's alpha stands under a
  # root, so `matrix_lr` is for them what alpha is for GaLore. It is the better
  # of two values that were tried.
  Method(
    "fira",
    "Fira: GaLore plus a scaled residual",
    transforms.fira,
    projects=True,
    around_adam=True,
    ignores={"residual": "which scales the residual in its own way"},
    small={"learning_rate": 8e-3, "scale": 1.0, "matrix_lr": 0.25},
    llama_rate=GALORE_RATE,
    # Most of its update is the residual, which is not scaled by alpha.
    fine_tuning={"scale": 1.0},
  ),
  Method(
    "apollo",
    "APOLLO: random projections scale the channels of gradients",
    transforms.apollo,
    projects=True,
    random_bases=True,
    ignores=_RANDOM_IGNORES,
    unwatchable=_RANDOM,
    small={"learning_rate": 8e-3, "scale": 1.0, "matrix_lr": 0.25},
    llama_rate=GALORE_RATE,
    llama_scale=1.0,
  ),
  Method(
    "apollo_mini",
    "APOLLO-Mini: the same with one factor a matrix, at rank 1",
    transforms.apollo_mini,
    projects=True,
    random_bases=True,
    ignores=_RANDOM_IGNORES,
    unwatchable=_RANDOM,
    # At rank 1 the scale makes up for a factor that is too small.
    small={"learning_rate": 8e-3, "scale": 128.0, "matrix_lr": 0.125},
    llama_rate=GALORE_RATE,
    llama_scale=128.0,
  ),
  Method(
    "q_apollo_mini",
    "APOLLO-Mini with weights in 8 bits",
    transforms.q_apollo_mini,
    projects=True,
    random_bases=True,
    ignores=_RANDOM_IGNORES,
    unwatchable=_RANDOM,
    small={"learning_rate": 8e-3, "scale": 128.0, "matrix_lr": 0.125},
    llama_rate=GALORE_RATE,
    llama_scale=128.0,
    weights="int8",
  ),
  # SUMO and GUM take GaLore's rate, which is not tuned for them.
  Method(
    "sumo",
    "SUMO: orthogonalized momentum in a subspace",
    transforms.sumo,
    projects=True,
    lean=True,
    small={"learning_rate": 8e-3, "scale": 0.2},
    llama_rate=GALORE_RATE,
  ),
  Method(
    "gum",
    "GUM: SUMO in which some matrices follow their whole gradient",
    transforms.gum,
    projects=True,
    one_layer="draws matrices among all layers; use sumo",
    ignores={
      "moments": "whose momentum begins with each draw",
      "random_from": "which draws matrices, not bases",
      "burst": "whose draws belong to a refresh of one step",
      "residual": "whose drawn matrices follow the residual",
    },
    small={"learning_rate": 8e-3, "scale": 0.2},
    llama_rate=GALORE_RATE,
    # As published: bases, draws and momentum start again together.
    options={"refresh": "synchronous"},
  ),
  Method(
    "ldadam",
    "LDAdam: a new basis each step, with error feedback",
    transforms.ldadam,
    projects=True,
    around_adam=True,
    iterations=1,
    ignores={
      "random_from": "whose bases follow the momentum",
      "burst": "whose bases change at every step",
      "residual": "which returns the residual by feedback",
      "moments": "which has a rule of its own",
    },
    small=_SMALL_ADAMW,
    # As in its authors' code.
    options={
      "b1": 0.908,
      "b2": 0.99,
      "scale": 1.0,
      "update_proj_gap": 1,
      "refresh": "synchronous",
    },
  ),
  _factors("lora", "LoRA", _lora),
  _factors("qlora", "QLoRA: LoRA on frozen weights in 4 bits", _qlora),
  _factors(
    "relora",
    "ReLoRA: LoRA whose factors are merged and restarted",
    _relora,
    restarts=True,
  ),
  _factors("low_rank", "Low-Rank: factors alone, without weights", _low_rank),
)
METHODS: Mapping[str, Method] = {method.name: method for method in _RECORDS}


def get(name: str) -> Method:
  """The record of a method.

  Raises:
    UserError: there is none of that name.
  """
  if name not in METHODS:
    raise UserError(
      f"optimizer.name={name} is unknown; must be one of {', '.join(METHODS)}"
    )
  return METHODS[name]


def summary() -> str:
  """One line a method, for `--help`."""
  return "\n".join(f"  {m.name:<18}{m.about}" for m in _RECORDS)
