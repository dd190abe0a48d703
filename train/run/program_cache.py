"""Compiled programs on disk, for commands that make one run after another."""

import jax

from train.config.schema import DataConfig
from train.data import corpus


def enable() -> None:
  """Keeps compiled programs in the cache folder, however short they are.

  Runs whose programs differ in their inputs alone, such as learning rates that
  are a part of the optimizer's state, are then compiled once.
  """
  folder = corpus.cache_folder(DataConfig()) / "programs"
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
