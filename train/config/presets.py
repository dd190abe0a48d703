"""Named runs.

Each preset is a function of the optimizer's name. It derives from another one
and contains what it changes. `sotu_small` is the default and takes minutes on
two CPU cores. The `llama_*` presets have the sizes and the recipe of the GaLore
paper (arXiv 2403.03507, Table 5 and appendix C.1, with the values of its public
scripts).

Like the papers, they stream C4 from the hub and use the t5-base tokenizer. They
differ from the papers in these ways:
- Rows are packed. The papers give each document a row of its own, for which
  there is `--set data.rows=padded`; such a row has one token more than theirs,
  so that the last token is predicted too.
- An evaluation reads 40,000 rows of C4's validation split, some ten million
  tokens.
- All methods use GaLore's learning rate, rank and alpha for a size. Others are
  published: for Q-GaLore a learning rate of .015 (60M, 130M) and .004 (7B) and
  rank 1024 (1B), for Fira alpha .0625 (1B, 7B) and rank 64 (7B), for APOLLO
  rank 256 (7B).

So the perplexities quoted below are what the papers report, not what these
commands print. The papers' figures are exp of the mean loss times n/(n+1) for n
batches, because of an off-by-one in the public scripts. Their full-rank runs
are tuned less than those in later work.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from train.common.errors import UserError
from train.config.schema import (
  Config,
  DataConfig,
  ModelConfig,
  OptimizerConfig,
  RunConfig,
  TrainConfig,
)
from train.methods import registry


def _change(config: Config, group: str, **fields: Any) -> Config:
  part = dataclasses.replace(getattr(config, group), **fields)
  return dataclasses.replace(config, **{group: part})


def sotu_small(optimizer: str) -> Config:
  """2.6M parameters on the bundled State of the Union speeches.

  `python -m train.pretrain` reads a million tokens in some four minutes on
  two CPU cores. The held-out perplexity a token for seed 0 is 2,147 untrained,
  578 for a unigram model, and 41 with GaLore at the end (45 without the
  residual).
  """
  method = registry.get(optimizer)
  # In a short run, some methods gain from sixty bases instead of ten
  # (docs/results/short-runs.md). Others keep ten, because more were not tried,
  # or take an SVD of every matrix, or because for GUM the gap is also how long
  # a matrix follows its whole gradient.
  gap = 8 if method.frequent else 50
  return Config(
    preset="sotu_small",
    model=ModelConfig(
      vocab_size=2048, d_model=192, d_ff=512, n_layers=4, n_heads=4, unroll=4
    ),
    data=DataConfig(length=128, batch=16),
    optimizer=OptimizerConfig(
      name=optimizer, rank=48, update_proj_gap=gap, **method.small
    ),
    train=TrainConfig(steps=500),
  )


def llama_60m(optimizer: str) -> Config:
  """58M parameters, 1.3B tokens: the papers' smallest size.

  C4 validation perplexity in the GaLore paper's Table 2: full rank 34.06,
  GaLore (rank 128) 34.88, ReLoRA 37.04, LoRA 34.99, Low-Rank 78.18.
  Later papers: Q-GaLore 34.88; Fira 31.06, APOLLO (r = d/4) 31.55,
  APOLLO-Mini 31.93.
  """
  # The papers name no rate for their full-rank baselines: 1e-3 is the middle
  # of their grid, not tuned. The GaLore methods take .01 with alpha = .25, and
  # so do Fira, SUMO and GUM; APOLLO takes .01 with an alpha of its own.
  method = registry.get(optimizer)
  return Config(
    preset="llama_60m",
    model=ModelConfig(
      vocab_size=32000,
      d_model=512,
      d_ff=1376,
      n_layers=8,
      n_heads=8,
      dtype="bfloat16",
      param_dtype="bfloat16",
    ),
    data=DataConfig(
      path="hub:allenai/c4:en",
      tokenizer="hub:t5-base",
      length=256,
      batch=512,
      eval_rows=40_000,
    ),
    optimizer=OptimizerConfig(
      name=optimizer,
      learning_rate=method.llama_rate,
      scale=method.llama_scale,
      rank=128,
      update_proj_gap=200,
      # As in the script of ReLoRA's authors for 130M.
      reset_every=2000,
      restart_warmup=100,
      clip=0.0,
    ),
    train=TrainConfig(steps=10_000),
    run=RunConfig(eval_every=1000, checkpoint_every=1000),
  )


def _resize(
  base: Config, name: str, *, rank: int, steps: int = 0, **model: Any
) -> Config:
  """A preset of another size with the recipe of `base`."""
  base = dataclasses.replace(base, preset=name)
  base = _change(base, "model", **model)
  base = _change(base, "optimizer", rank=rank)
  return _change(base, "train", steps=steps or base.train.steps)


def llama_9m(optimizer: str) -> Config:
  """9M parameters: not published; the recipe of 60M with rank d/4."""
  return _resize(
    llama_60m(optimizer),
    "llama_9m",
    rank=32,
    d_model=128,
    d_ff=352,
    n_layers=4,
    n_heads=4,
  )


def llama_130m(optimizer: str) -> Config:
  """134M parameters, 2.6B tokens.

  C4 validation perplexity in the GaLore paper's Table 2: full rank 25.08,
  GaLore (rank 256) 25.36, ReLoRA 29.37, LoRA 33.92, Low-Rank 45.51.
  Later papers: Q-GaLore 25.53; Fira 22.73, APOLLO (r = d/4) 22.94,
  APOLLO-Mini 23.53.
  """
  return _resize(
    llama_60m(optimizer),
    "llama_130m",
    rank=256,
    steps=20_000,
    d_model=768,
    d_ff=2048,
    n_layers=12,
    n_heads=12,
  )


def llama_350m(optimizer: str) -> Config:
  """368M parameters, 7.9B tokens.

  C4 validation perplexity in the GaLore paper's Table 2: full rank 18.80,
  GaLore (rank 256) 18.95, ReLoRA 29.08, LoRA 25.58, Low-Rank 37.41.
  Later papers: Q-GaLore 19.79; Fira 17.03, APOLLO (r = d/4) 16.85,
  APOLLO-Mini 17.18.
  """
  return _resize(
    llama_130m(optimizer),
    "llama_350m",
    rank=256,
    steps=60_000,
    d_model=1024,
    d_ff=2736,
    n_layers=24,
    n_heads=16,
  )


def llama_1b(optimizer: str) -> Config:
  """1.3B parameters, 13.1B tokens.

  C4 validation perplexity in the GaLore paper's Table 2: full rank 15.56,
  GaLore (rank 512, though its script says 1024) 15.64, ReLoRA 18.33, LoRA
  19.21, Low-Rank 142.53.
  Later papers: Q-GaLore 16.25; Fira 14.31, APOLLO (r = d/4) 14.20,
  APOLLO-Mini 14.17.
  """
  return _resize(
    llama_350m(optimizer),
    "llama_1b",
    rank=512,
    steps=100_000,
    d_model=2048,
    d_ff=5461,
    n_heads=32,
    remat="full",
  )


def llama_7b(optimizer: str) -> Config:
  """6.7B parameters, 19.7B tokens.

  C4 validation perplexity after 150K steps in the GaLore paper's Table 3:
  8-bit GaLore (rank 1024) 14.65, 8-bit Adam 14.61, one untuned trial each.
  After 40K: 17.94 and 18.09; the Q-GaLore paper adds 18.83 for its own.
  APOLLO (rank 256) reports 13.02 after 150K, APOLLO-Mini 13.09.
  """
  base = _resize(
    llama_1b(optimizer),
    "llama_7b",
    rank=1024,
    steps=150_000,
    d_model=4096,
    d_ff=11008,
    n_layers=32,
  )
  rate = base.optimizer.learning_rate / 2
  return _change(
    base, "optimizer", learning_rate=rate, update_proj_gap=500, clip=1.0
  )


PRESETS: dict[str, Callable[[Any], Config]] = {
  preset.__name__: preset
  for preset in (
    sotu_small,
    llama_9m,
    llama_60m,
    llama_130m,
    llama_350m,
    llama_1b,
    llama_7b,
  )
}


def make(preset: str, optimizer: str) -> Config:
  """The config of a preset with an optimizer.

  Raises:
    UserError: one of the names is unknown.
  """
  if preset not in PRESETS:
    raise UserError(
      f"--preset {preset!r} is unknown; the presets are {', '.join(PRESETS)}"
    )
  if optimizer not in registry.METHODS:
    raise UserError(
      f"--optimizer {optimizer!r} is unknown; the optimizers are"
      f" {', '.join(registry.METHODS)}"
    )
  method, config = registry.get(optimizer), PRESETS[preset](optimizer)
  config = _change(config, "model", weights=method.weights)
  return _change(config, "optimizer", **method.options)


def lean(config: Config) -> Config:
  """The same run with gradients at rank r.

  They have no residual. GaLore's methods then take the papers' alpha, because
  less of the gradient moves the weights.

  Raises:
    UserError: the optimizer needs whole gradients.
  """
  changes: dict[str, Any] = {"residual": "none"}
  if config.optimizer.residual != "none":
    changes["scale"] = OptimizerConfig.scale
  return dataclasses.replace(
    config,
    optimizer=dataclasses.replace(config.optimizer, **changes),
    train=dataclasses.replace(config.train, lean=True),
  )


def summary() -> str:
  """One line for each preset, from its docstring."""
  return "\n".join(
    f"  {name:<12}{(make.__doc__ or '').splitlines()[0]}"
    for name, make in PRESETS.items()
  )
