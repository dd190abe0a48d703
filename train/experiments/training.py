"""Makes runs with the training step of `train.pretrain`, and their records."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

import galore_optax
from train.config import presets, schema
from train.data import corpus as corpus_lib
from train.experiments import lanes, stability, tables, texts, training_loop
from train.experiments.plan import Record, Run
from train.measure import machine
from train.methods import registry
from train.parallel import mesh as mesh_lib

# Options that every run has unless its variant changes them, whatever the
# preset's defaults are: records were made before some of these changed.
PINNED = (
  "optimizer.residual=none",
  "optimizer.burst=0",
  "optimizer.residual_growth=0",
)
POINTS = 500  # most points of a recorded loss curve
VALIDATION_ROWS = 256  # most rows of the validation text
TEST_ROWS = 2048  # most rows of the test text


def settings(run: Run, parts: texts.Parts) -> list[str]:
  """The run as settings of `train.pretrain --set`."""
  data = schema.override(
    presets.make(tables.PRESET, run.variant.optimizer), list(run.settings)
  ).data
  steps = max(1, round(run.tokens / (data.batch * data.length)))
  gap = max(1, steps // run.variant.gaps)
  if run.variant.gaps < 10:  # rounded up, to have no extra basis at the end
    gap = -(-steps // run.variant.gaps)
  cycle = -(-2 * steps // run.variant.gaps)  # rounded up, as no cycle is cut
  every = -(-steps // run.evaluations)
  return [
    *PINNED,
    *run.settings,
    f"data.path={parts.train}",
    f"data.validation={parts.validation}",
    f"data.eval_rows={VALIDATION_ROWS}",
    f"train.steps={steps}",
    f"train.seed={run.seed}",
    f"optimizer.learning_rate={run.rate:g}",
    f"optimizer.matrix_lr={run.multiplier:g}",
    f"optimizer.update_proj_gap={gap}",
    *_restarts(run, cycle),
    f"run.eval_every={every}",
    f"run.checkpoint_every={max(1, steps // 4)}",
    "run.log_every=1",
    "run.keep=1",
    "run.keep_best=0",
    "run.watch=none",
    *run.variant.settings,
  ]


def _restarts(run: Run, cycle: int) -> list[str]:
  """ReLoRA's cycles; other methods have none."""
  if not registry.get(run.variant.optimizer).restarts:
    return []
  return [
    f"optimizer.reset_every={cycle}",
    f"optimizer.restart_warmup={cycle // 10}",
  ]


def config_of(run: Run, parts: texts.Parts) -> schema.Config:
  """The run as a config of `train.pretrain`."""
  start = presets.make(tables.PRESET, run.variant.optimizer)
  return schema.override(start, settings(run, parts))


def command(run: Run, parts: texts.Parts) -> str:
  """The command that trains the same with `train.pretrain`."""
  arguments = ["--preset", tables.PRESET, "--optimizer", run.variant.optimizer]
  for setting in settings(run, parts):
    name, _, value = setting.partition("=")
    local = name in ("data.path", "data.validation")
    value = pathlib.Path(value).name if local else value
    arguments += ["--set", f"{name}={value}"]
  return f"python -m train.pretrain {shlex.join(arguments)}"


def train(
  runs: Sequence[Run],
  parts: texts.Parts,
  out: pathlib.Path,
  stopped: Callable[[], bool],
  other: pathlib.Path | None = None,
) -> list[Record] | None:
  """Trains runs side by side, or resumes them where they were stopped.

  Args:
    runs: The runs; `program_of` is the same for all of them.
    parts: Files of the text.
    out: Their folder, for checkpoints and for `log.txt`, their printed output.
    stopped: Called before each dispatch; whether to stop.
    other: File of a text of another kind, which is only reported on.

  Returns:
    The records of the finished or diverged runs, None if they were stopped.
  """
  configs = [config_of(run, parts) for run in runs]
  common = lanes.common(configs[0])
  corpus = _corpus(common.data, common.model.vocab_size)
  mesh = mesh_lib.make_mesh(common.mesh, common.data.batch, jax.devices()[:1])
  out.mkdir(parents=True, exist_ok=True)
  with _output_to(out / "log.txt"), jax.set_mesh(mesh):
    program = _program(common, len(runs), mesh)
    with contextlib.closing(
      training_loop.Training(program, configs, corpus, out)
    ) as training:
      if not training.run(stopped):
        return None
      reported = {"test_loss": parts.test}
      reported |= {"other_loss": other} if other else {}
      outcomes = _outcomes(common, training, reported)
  return [
    _identity(run, config, parts) | outcome
    for run, config, outcome in zip(runs, configs, outcomes, strict=True)
  ]


# A search goes from one method to another and back, on the same text.
_program = functools.lru_cache(maxsize=32)(lanes.make)
_corpus = functools.lru_cache(maxsize=4)(corpus_lib.prepare)


def program_of(run: Run, parts: texts.Parts) -> schema.Config:
  """What runs have to have in common to be trained by one program."""
  return lanes.common(config_of(run, parts))


@contextlib.contextmanager
def _output_to(path: pathlib.Path) -> Iterator[None]:
  """Redirects printed output and errors to a file."""
  with (
    path.open("a", encoding="utf-8") as log,
    contextlib.redirect_stdout(log),
    contextlib.redirect_stderr(log),
  ):
    yield


def _outcomes(
  config: schema.Config,
  training: training_loop.Training,
  reported: dict[str, pathlib.Path],
) -> list[Record]:
  """What the records say of each lane's result.

  Args:
    config: What the lanes have in common.
    training: Their training, at its end.
    reported: Texts by which nothing is selected, by the name of their loss.
  """
  losses = {
    name: training.losses_on(_rows_of(path, config))
    for name, path in reported.items()
  }
  sizes = _sizes(training.program.setup.abstract.state)
  return [
    _outcome(
      config, training, lane, {name: x[lane] for name, x in losses.items()}
    )
    | {"bytes": sizes}
    for lane in range(training.lanes)
  ]


def _outcome(
  config: schema.Config,
  training: training_loop.Training,
  lane: int,
  reported: dict[str, float],
) -> Record:
  history = training.history
  if history.skips_in_row[lane] >= config.train.max_skips:
    why = f"no finite gradient in {config.train.max_skips} steps in a row"
    return {"status": "diverged", "why": why}
  scores = [(step, losses[lane]) for step, losses in history.scores]
  if not all(map(math.isfinite, (scores[-1][1], *reported.values()))):
    return {"status": "diverged", "why": "no finite loss at the end"}
  losses = [
    (step, loss)
    for step, loss in enumerate((x[lane] for x in history.losses), start=1)
    if math.isfinite(loss)
  ]
  state = training.state_of(lane)
  return {
    "status": "done",
    "validation_loss": scores[-1][1],
    **reported,
    "lanes": training.lanes,
    "tokens_per_second": round(training.tokens_per_second(), 1),
    "curve": _averaged(losses),
    **stability.summarize(losses, state.opt_state),
    "validation_curve": [[s, round(loss, 5)] for s, loss in scores],
    "skipped": int(state.skipped),
  }


def _sizes(state: Any) -> dict[str, int]:
  return {
    "optimizer": galore_optax.state_bytes(state.opt_state),
    "weights": galore_optax.state_bytes(state.params),
  }


def _rows_of(path: pathlib.Path, config: schema.Config) -> np.ndarray:
  """The rows of a text that is reported on."""
  data = dataclasses.replace(
    config.data, validation=str(path), eval_rows=TEST_ROWS
  )
  return _corpus(data, config.model.vocab_size).held_out


def _averaged(points: list[tuple[int, float]]) -> list[list[float]]:
  """A curve of `POINTS` points: last step and mean loss of each stretch."""
  stretches = np.array_split(np.array(points), min(POINTS, len(points)))
  return [
    [int(part[-1, 0]), round(float(part[:, 1].mean()), 4)] for part in stretches
  ]


def _identity(run: Run, config: schema.Config, parts: texts.Parts) -> Record:
  """What was run, when and where."""
  return {
    "key": run.key,
    "entry": run.variant.name,
    "learning_rate": run.rate,
    "multiplier": run.multiplier,
    "seed": run.seed,
    "tokens": run.tokens,
    "steps": config.train.steps,
    "text": run.text,
    **machine.provenance(command(run, parts)),
  }
