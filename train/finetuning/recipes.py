"""The default run of each task: the papers' recipes where they exist.

GLUE follows Table 7 of the GaLore paper (arXiv 2403.03507) for RoBERTa-base: 30
epochs, batches of 16 (CoLA 32), up to 512 tokens, linear decay of the learning
rate without a warm-up, no clipping, alpha 4 at rank 4 and 2 at rank 8. The
learning rates of its baselines are not published: AdamW takes GaLore's, LoRA
those of its own paper (arXiv 2106.09685, Table 9, with alpha = 2r: the public
code has alpha 16 at rank 8). SQuAD has rank 16 as in the GaLore paper, which
gives no learning rate; that, the length and the epochs are BERT's.
"""

import dataclasses
from typing import Any, NamedTuple

from train.common.errors import UserError
from train.config import schema
from train.config.schema import SharedOptimizerConfig, SharedRunConfig
from train.finetuning import tasks
from train.finetuning.config import Config, DataConfig, TaskConfig
from train.methods import registry


class Glue(NamedTuple):
  """The papers' values for one task."""

  rank4: float  # learning rate of GaLore at rank 4, alpha 4
  rank8: float  # learning rate of GaLore at rank 8, alpha 2
  lora: float  # learning rate of LoRA
  batch: int = 16


GLUE = {
  "cola": Glue(3e-5, 1e-5, 4e-4, batch=32),
  "stsb": Glue(1e-5, 3e-5, 4e-4),
  "mrpc": Glue(3e-5, 2e-5, 4e-4),
  "rte": Glue(1e-5, 2e-5, 5e-4),
  "sst2": Glue(1e-5, 2e-5, 5e-4),
  "mnli": Glue(1e-5, 1e-5, 5e-4),
  "qnli": Glue(1e-5, 1e-5, 4e-4),
  "qqp": Glue(1e-5, 2e-5, 5e-4),
}
RANK = 4  # the papers' tables have ranks 4 and 8
PAPERS_GAP = 500
METHODS = (
  "adamw",
  "adamw_8bit",
  "galore",
  "galore_faithful",
  "galore_8bit",
  "q_galore",
  "fira",
  "lora",
  "qlora",
)


class Recipe(NamedTuple):
  """The values that depend on the task."""

  task: dict[str, Any]  # fields of TaskConfig
  data: dict[str, Any]  # fields of DataConfig
  weights_lr: float  # learning rate of methods that train the weights
  adapters_lr: float  # learning rate of methods that train adapters
  scale: float  # GaLore's alpha
  gap: int = 50  # steps between two refreshes of a basis
  rank: int = RANK
  clip: float = 1.0  # maximum norm of the gradient


def _glue(name: str, rank: int) -> Recipe:
  row = GLUE[name]
  small = rank < 8
  return Recipe(
    {"epochs": 30.0},
    {"batch": row.batch, "length": 512},
    row.rank4 if small else row.rank8,
    row.lora,
    4.0 if small else 2.0,
    gap=PAPERS_GAP,
    clip=0.0,
  )


def _span(epochs: float) -> Recipe:
  return Recipe(
    {"epochs": epochs},
    {"batch": 32, "length": 384},
    3e-5,
    3e-4,
    2.0,
    rank=16,
  )


def _chat(length: int) -> Recipe:
  return Recipe(
    {"epochs": 1.0}, {"batch": 8, "length": length}, 3e-5, 3e-4, 4.0
  )


# For the models and data sets that Python packages contain, and for SQuAD.
OTHERS = {
  "rotten_tomatoes": Recipe(
    {"epochs": 2.0, "pool": "mean"},
    {"batch": 32, "length": 64, "holdout_every": 8},
    1e-4,
    1e-3,
    4.0,
    gap=10,
  ),
  "imdb": Recipe(
    {"epochs": 2.0, "pool": "mean"},
    {"batch": 32, "length": 256},
    1e-4,
    1e-3,
    4.0,
  ),
  "boolq": Recipe(
    {"epochs": 3.0, "pool": "mean"},
    {"batch": 32, "length": 192},
    1e-4,
    1e-3,
    4.0,
  ),
  "disflqa": _span(10.0),
  "squad": _span(2.0)._replace(gap=PAPERS_GAP),
  "squad_v2": _span(2.0)._replace(gap=PAPERS_GAP),
  "span": _span(2.0),
  "chat": _chat(512),
  "fiqa": _chat(256),
}
GENERAL = Recipe({}, {"batch": 32, "length": 128}, 3e-5, 3e-4, 4.0)


def make(task: str, optimizer: str, rank: int | None = None) -> Config:
  """The default run of a task.

  Args:
    task: name of the task.
    optimizer: name of the method.
    rank: the method's rank; None: the task's default.

  Raises:
    UserError: the task is unknown, or the method is not for fine-tuning.
  """
  tasks.find(task)
  if optimizer not in METHODS:
    raise UserError(
      f"--optimizer {optimizer!r} is not for fine-tuning; the methods are"
      f" {', '.join(METHODS)}"
    )
  if rank is not None and rank < 1:
    raise UserError(f"--rank must be 1 or more, got {rank}")
  if task in GLUE:
    recipe = _glue(task, rank or RANK)
  else:
    recipe = OTHERS.get(task, GENERAL)
  rank = rank or recipe.rank
  config = Config(
    preset=task,
    task=TaskConfig(name=task, **recipe.task),
    data=DataConfig(**recipe.data),
    optimizer=_optimizer(optimizer, rank, recipe),
    run=SharedRunConfig(
      log_every=20, checkpoint_every=500, keep=1, keep_best=0
    ),
  )
  weights: Any = registry.get(optimizer).weights
  model = dataclasses.replace(config.model, weights=weights)
  return dataclasses.replace(config, model=model)


def _optimizer(name: Any, rank: int, recipe: Recipe) -> SharedOptimizerConfig:
  method = registry.get(name)
  adapters = method.factors is not None
  config = SharedOptimizerConfig(
    name=name,
    learning_rate=recipe.adapters_lr if adapters else recipe.weights_lr,
    warmup=0.0,
    decay="linear",
    final=0.0,
    rank=rank,
    update_proj_gap=recipe.gap,
    scale=recipe.scale,
    lora_alpha=2.0 * rank,
    clip=recipe.clip,
  )
  return dataclasses.replace(config, **method.fine_tuning)


# Fields that a flag sets, because the recipe depends on them.
FLAGS = {
  "task.name": "--task",
  "optimizer.name": "--optimizer",
  "optimizer.rank": "--rank",
  "train.init": "--from",
}


def override(config: Config, settings: list[str]) -> Config:
  """Applies the `--set group.field=value` settings of the command line.

  Raises:
    UserError: a field is unknown, has no such value, or is set by a flag.
  """
  named = {setting.partition("=")[0].strip() for setting in settings}
  for field in sorted(named & FLAGS.keys()):
    raise UserError(f"--set {field}: use {FLAGS[field]}, which sets it")
  if "train.steps" in named and "task.epochs" not in named:
    settings = [*settings, "task.epochs=0"]
  changed = schema.override(config, settings)
  if {"train.steps", "task.epochs"} <= named and changed.task.epochs:
    raise UserError(
      f"train.steps={changed.train.steps} and task.epochs="
      f"{changed.task.epochs:g} both say how long to train; leave one out"
    )
  return changed
