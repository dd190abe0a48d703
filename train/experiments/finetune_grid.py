"""Fine-tunes with several methods, learning rates and seeds, and tabulates.

  python -m train.experiments.finetune_grid pick RESULTS --from FOLDER \
    --methods adamw \
    --rates 1e-4 3e-4
  python -m train.experiments.finetune_grid run RESULTS --from FOLDER \
    --methods adamw galore:4 lora:4 --seeds 0 1 2
  python -m train.experiments.finetune_grid table RESULTS

`pick` trains each method with each learning rate and scores it on a part of
the training split. `run` trains each method with its best rate from there, and
scores it on the validation split; `--rates` overrides the choice. A method
that was not picked at its rank takes the best rate of the same optimizer at
another rank.

Both add a line for each run to the file RESULTS and skip runs that it already
holds, so the same command continues after a stop. Started several times with
one --work, the command makes several runs at a time. The other flags are those
of `python -m train.finetune --help`.
"""

import argparse
import hashlib
import json
import pathlib
import re
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from train import finetune
from train.common import commands
from train.common.errors import Diverged, UserError
from train.config.schema import HUB
from train.experiments import results, sweep
from train.finetuning import evaluation, report, tasks
from train.run import run_dir

Record = dict[str, Any]
# Settings in which the runs of one method differ, and the held-out part.
VARIED = ("optimizer.learning_rate=", "train.seed=", "data.validation=none")


class Method(NamedTuple):
  """An optimizer, its rank, and settings of its own."""

  text: str  # as given: galore:8+task.freeze=^embed/
  optimizer: str
  rank: int | None  # None: the task's default
  settings: tuple[str, ...]


class Run(NamedTuple):
  """One fine-tuning run of the grid."""

  method: Method
  rate: float
  seed: int
  command: list[str]  # the arguments of train.finetune, without --out
  key: str


def parse_method(text: str) -> Method:
  """Reads `galore:8` or `galore:8+task.freeze=^embed/`.

  Raises:
    UserError: the rank is not a number.
  """
  name, *settings = text.split("+")
  optimizer, colon, rank = name.partition(":")
  if colon and not rank.isdigit():
    raise UserError(
      f"--methods {text}: the rank is {rank!r}; write NAME or NAME:RANK"
    )
  return Method(text, optimizer, int(rank) if rank else None, tuple(settings))


def make_command(
  flags: argparse.Namespace, method: Method, rate: float, seed: int
) -> list[str]:
  """The arguments of `train.finetune` for one run, without --out."""
  settings = [*flags.settings, *method.settings]
  settings += [f"optimizer.learning_rate={rate:g}", f"train.seed={seed}"]
  if flags.command == "pick":
    settings += ["data.validation=none"]
  command = ["--task", flags.task, "--from", flags.source]
  command += ["--optimizer", method.optimizer]
  command += ["--rank", str(method.rank)] if method.rank is not None else []
  return command + [word for s in settings for word in ("--set", s)]


def shown_command(flags: argparse.Namespace, command: list[str]) -> str:
  """A run's command line as it is recorded.

  It names the checkpoint by a placeholder: its path differs between machines.
  """
  words = ["$CHECKPOINT" if word == flags.source else word for word in command]
  return " ".join(["python -m train.finetune", *words])


def choose_rates(
  flags: argparse.Namespace, checkpoint: str, method: Method
) -> Sequence[float]:
  """The learning rates to train a method with.

  Raises:
    UserError: none was given, and none was picked.
  """
  if flags.rates:
    return flags.rates
  if flags.command == "pick":
    raise UserError("pick: name the learning rates to try with --rates")
  task, settings = tasks.find(flags.task), _own_settings(flags, method)
  picks = [
    r
    for r in results.read(flags.results)
    if (r["stage"], r["task"]) == ("pick", flags.task)
    and r["checkpoint"] == checkpoint
    and _settings(r) == settings
  ]
  if picks:  # scores on examples that have changed since do not compare
    newest = picks[-1].get("examples")
    picks = [r for r in picks if r.get("examples") == newest]
  picks = [r for r in picks if r["method"] == method.text] or [
    r for r in picks if r["optimizer"] == method.optimizer
  ]
  if not picks:
    raise UserError(
      f"{flags.results} has no picked learning rate for {method.text} with"
      " this checkpoint and these settings; run `pick` first, or give one with"
      " --rates"
    )
  finished = [r for r in picks if r["scores"]]
  if not finished:
    raise UserError(
      f"{flags.results}: {method.text} diverged with every learning rate that"
      " was tried; `pick` smaller ones"
    )
  by_rate = _group_by(finished, "learning_rate")
  mean_objective = lambda rate: statistics.mean(
    evaluation.objective(task, r["scores"]) for r in by_rate[rate]
  )
  return [min(by_rate, key=mean_objective)]


def _own_settings(flags: argparse.Namespace, method: Method) -> frozenset[str]:
  """The settings that all runs of a method share, whatever rate and seed.

  Raises:
    UserError: one of them is set by another flag.
  """
  settings = (*flags.settings, *method.settings)
  for setting in settings:
    if setting.startswith(VARIED):
      raise UserError(
        f"--set {setting}: --rates, --seeds, and `pick` or `run` set that"
      )
  return frozenset(settings)


def _group_by(records: list[Record], name: str) -> dict[Any, list[Record]]:
  groups: dict[Any, list[Record]] = {}
  for record in records:
    groups.setdefault(record[name], []).append(record)
  return groups


def missing(flags: argparse.Namespace, checkpoint: str) -> list[Run]:
  """The runs without a result, seed by seed: a stop leaves a fair part."""
  done = {
    (r["stage"], r["checkpoint"], r["command"])
    for r in results.read(flags.results)
  }
  runs = []
  for seed in flags.seeds:
    for method in map(parse_method, flags.methods):
      for rate in choose_rates(flags, checkpoint, method):
        command = make_command(flags, method, rate, seed)
        shown = shown_command(flags, command)
        identity = (flags.command, checkpoint, shown)
        if identity not in done:
          text = json.dumps(identity).encode()
          key = hashlib.blake2b(text, digest_size=8).hexdigest()
          runs.append(Run(method, rate, seed, command, key))
  return runs


SAMPLES = 256  # stretches of a file of weights that the fingerprint reads


def fingerprint(source: str) -> str:
  """Identifies a checkpoint by its weights, wherever its folder is.

  Raises:
    UserError: there is none.
  """
  if source.startswith(HUB):
    return source
  path = pathlib.Path(source).expanduser()
  files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
  if not files:
    raise UserError(f"--from {source}: there are no weights")
  digest = hashlib.blake2b(digest_size=8)
  for file in files:
    size = file.stat().st_size
    digest.update(f"{file.name} {size}\n".encode())
    with file.open("rb") as opened:
      for part in range(SAMPLES):  # evenly spaced: a file may be large
        opened.seek(size * part // SAMPLES)
        digest.update(opened.read(2**14))
  return digest.hexdigest()


def run_all(flags: argparse.Namespace) -> int:
  """Makes the missing runs; the first that fails ends it."""
  checkpoint = fingerprint(flags.source)
  statuses = []

  def make(run: Run, out: pathlib.Path) -> Record | None:
    words = [*run.command, "--out", str(out)]
    words += ["--overwrite"] if flags.overwrite else []
    try:
      status = finetune.command(words)
    except Diverged as error:
      print(f"stopped: {error}\nnote       recorded as diverged")
      status = 0
    if status:
      statuses.append(status)
      return None
    result = json.loads((out / report.FILE).read_text(encoding="utf-8"))
    return {
      "stage": flags.command,
      "method": run.method.text,
      "checkpoint": checkpoint,
      "examples": run_dir.examples_digest(out),
      **result,
      "command": shown_command(flags, run.command),
    }

  sweep.run_missing(
    lambda: missing(flags, checkpoint),
    lambda runs, out: [made] if (made := make(runs[0], out)) else None,
    flags.results,
    flags.work,
    stopped=lambda: False,  # a run under way stops by itself
  )
  return next(iter(statuses), 0)


SIZES = ("weights", "adapters", "gradients", "optimizer", "optimizer_blocks")


def table(records: list[Record]) -> str:
  """Markdown tables of the runs: mean and standard deviation of scores, bytes.

  There is one table for each task. The column *loss* compares methods in runs
  that are too short for their scores to differ. *held out* is the mean score
  of the same learning rate in `pick`, where it was tried.
  """
  runs = [record for record in records if record["stage"] == "run"]
  if not runs:
    raise UserError("there is no finished run in the results")
  picks = [record for record in records if record["stage"] == "pick"]
  runs_by_task, picks_by_task = (
    _group_by(runs, "task"),
    _group_by(picks, "task"),
  )
  tables = {
    name: _task_table(name, group, picks_by_task.get(name, []))
    for name, group in runs_by_task.items()
  }
  if len(tables) == 1:  # the file's name says which task it is
    return next(iter(tables.values()))
  return "\n\n".join(f"**{name}**\n\n{text}" for name, text in tables.items())


def _task_table(task: str, runs: list[Record], picks: list[Record]) -> str:
  metric = tasks.find(task).metrics[0]
  lines = [
    f"| method | learning rate | held out | {metric} | loss | seeds |"
    " weights, MB | adapters | gradients | optimizer state | of which blocks |",
    "|---" * 11 + "|",
  ]
  rows, picked = _group_seeds(runs), _group_seeds(picks)
  common = frozenset.intersection(*(settings for *_, settings in rows))
  several = len({checkpoint for _, _, checkpoint, _ in rows}) > 1
  for key, seeds in sorted(rows.items(), key=lambda item: item[0][:3]):
    name, rate, checkpoint, settings = key
    finished = [record for record in seeds if record["scores"]]
    sizes = finished[0]["bytes"] if finished else {}
    of_all = "" if len(finished) == len(seeds) else f" of {len(seeds)}"
    own = sorted(settings - common - set(parse_method(name).settings))
    cells = [
      _title(name, [*own, *([checkpoint] if several else [])]),
      f"{rate:g}",
      _mean(picked[key], metric) if key in picked else "",
      _mean_and_std(finished, metric),
      _mean_and_std(finished, "held_out_loss"),
      f"{len(finished)}{of_all}",
      *(f"{sizes.get(part, 0) / 1e6:.2f}" for part in SIZES),
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _group_seeds(records: list[Record]) -> dict[tuple, list[Record]]:
  """Groups runs that differ in their seeds only.

  The keys are method, learning rate, checkpoint and settings.
  """
  groups: dict[tuple, list[Record]] = {}
  for r in records:
    key = (r["method"], r["learning_rate"], r["checkpoint"], _settings(r))
    groups.setdefault(key, []).append(r)
  return groups


def _title(name: str, own: list[str]) -> str:
  """The first cell of a row: `galore:8, update_proj_gap=10`."""
  text, *settings = name.split("+")
  short = [re.sub(r"^[^=]*\.(?=[^.=]*=)", "", setting) for setting in settings]
  return " ".join([", ".join([text, *short]), *own])


def _mean(records: list[Record], metric: str) -> str:
  """The mean of a score, unless one of the runs diverged."""
  if not all(record["scores"] for record in records):
    return "diverged"
  return f"{statistics.mean(r['scores'][metric] for r in records):.4f}"


def _mean_and_std(records: list[Record], metric: str) -> str:
  """Mean and standard deviation of a score over finished runs."""
  if not records:
    return "diverged"
  values = [record["scores"][metric] for record in records]
  std = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
  return f"{statistics.mean(values):.4f}{std}"


def _settings(record: Record) -> frozenset[str]:
  """The settings of a run, without its learning rate and seed."""
  settings = record["command"].split(" --set ")[1:]
  return frozenset(s for s in settings if not s.startswith(VARIED))


def parse(argv: list[str] | None) -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m train.experiments.finetune_grid",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="command", required=True)
  for name, what in (
    ("pick", "try learning rates on a part of the training split"),
    ("run", "train with the picked rates, score on the validation split"),
    ("table", "print the results as Markdown"),
  ):
    command = commands.add_parser(name, help=what, description=what)
    command.add_argument(
      "results", type=pathlib.Path, metavar="RESULTS", help="a .jsonl file"
    )
    if name != "table":
      _add_run_flags(command)
  return parser.parse_args(argv)


def _add_run_flags(command: argparse.ArgumentParser) -> None:
  add = command.add_argument
  add("--from", dest="source", required=True, help="weights to start from")
  add("--task", default="rotten_tomatoes", help="default: rotten_tomatoes")
  add(
    "--methods",
    nargs="+",
    required=True,
    metavar="NAME:RANK+SETTING",
    help="optimizers, with their ranks and settings of their own:"
    " adamw galore:8 galore:8+task.freeze=^embed/",
  )
  add("--rates", nargs="+", type=float, default=[], help="learning rates")
  add("--seeds", nargs="+", type=int, default=[0], help="default: 0")
  add(
    "--set",
    action="append",
    default=[],
    dest="settings",
    metavar="GROUP.FIELD=VALUE",
    help="a setting of all runs; may be repeated",
  )
  add(
    "--work",
    type=pathlib.Path,
    default=pathlib.Path("runs/grid"),
    help="folder for unfinished runs; default: runs/grid",
  )
  add(
    "--overwrite",
    action="store_true",
    help="start unfinished runs again, where their data have changed",
  )


def main(argv: list[str] | None = None) -> int:
  """The command: 0 done, 1 diverged, 2 wrong input, 130 stopped."""
  flags = parse(argv)

  def run() -> int:
    if flags.command != "table":
      return run_all(flags)
    print(table(results.read(flags.results)))
    return 0

  return commands.run(run)


if __name__ == "__main__":
  sys.exit(main())
