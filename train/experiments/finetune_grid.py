"""Many fine-tuning runs and their table.

  python -m train.experiments.finetune_grid pick RESULTS --from FOLDER \
    --methods adamw \
    --rates 1e-4 3e-4
  python -m train.experiments.finetune_grid run RESULTS --from FOLDER \
    --methods adamw galore:4 lora:4 --seeds 0 1 2
  python -m train.experiments.finetune_grid table RESULTS

`pick` trains each method with each rate and scores it on a part of the
training split; `run` takes the best rate of each method from there (of those
on the same examples as the last; of the same optimizer at another rank, if
need be; or `--rates` where one is given), and scores on the validation split.
Both add a line a run to the file RESULTS and leave out what is in it, so that
the same command goes on where it was stopped. What other flags mean is said by
`python -m train.finetune --help`.
"""

import argparse
import hashlib
import json
import pathlib
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from train import finetune
from train.common.errors import Diverged, UserError
from train.config.schema import HUB
from train.finetuning import evaluation, report, tasks
from train.run import exit_status, run_dir

Record = dict[str, Any]


# The settings that runs of a method differ in, and what is held out.
VARIED = ("optimizer.learning_rate=", "train.seed=", "data.validation=none")


class Method(NamedTuple):
  """An optimizer at a rank: `galore:8`; `+` and settings are its own."""

  text: str
  optimizer: str
  rank: int | None  # None: the task's
  settings: tuple[str, ...]


def method(text: str) -> Method:
  """Reads `galore:8` or `galore:8+task.freeze=^embed/`.

  Raises:
    UserError: the rank is no number.
  """
  name, *settings = text.split("+")
  optimizer, colon, rank = name.partition(":")
  if colon and not rank.isdigit():
    raise UserError(
      f"--methods {text}: the rank is {rank!r}; write NAME or NAME:RANK"
    )
  return Method(text, optimizer, int(rank) if rank else None, tuple(settings))


def read(path: pathlib.Path) -> list[Record]:
  """The runs in a file of results."""
  if not path.exists():
    return []
  lines = path.read_text(encoding="utf-8").splitlines()
  return [json.loads(line) for line in lines if line.strip()]


def words(
  flags: argparse.Namespace, chosen: Method, rate: float, seed: int
) -> list[str]:
  """The command line of one run, without its folder."""
  settings = [*flags.settings, *chosen.settings]
  settings += [f"optimizer.learning_rate={rate:g}", f"train.seed={seed}"]
  if flags.command == "pick":
    settings += ["data.validation=none"]
  found = ["--task", flags.task, "--from", flags.source]
  found += ["--optimizer", chosen.optimizer]
  found += ["--rank", str(chosen.rank)] if chosen.rank is not None else []
  return found + [word for s in settings for word in ("--set", s)]


def rates(flags: argparse.Namespace, chosen: Method) -> Sequence[float]:
  """The learning rates to train a method with.

  Raises:
    UserError: none is given, and none was picked.
  """
  if flags.rates:
    return flags.rates
  if flags.command == "pick":
    raise UserError("pick: name the learning rates to try with --rates")
  task, wanted = tasks.find(flags.task), _own(flags, chosen)
  tried = [
    r
    for r in read(flags.results)
    if (r["stage"], r["task"]) == ("pick", flags.task)
    and r["checkpoint"] == flags.checkpoint
    and _settings(r) == wanted
  ]
  if tried:  # what was held out before the data changed is no measure
    now = tried[-1].get("examples")
    tried = [r for r in tried if r.get("examples") == now]
  # At another rank the same optimizer's rate serves, if there is none at this.
  picked = [r for r in tried if r["method"] == chosen.text] or [
    r for r in tried if r["optimizer"] == chosen.optimizer
  ]
  if not picked:
    raise UserError(
      f"{flags.results} has no picked learning rate for {chosen.text} with"
      " this checkpoint and these settings; run `pick` first, or give one with"
      " --rates"
    )
  finished = [r for r in picked if r["scores"]]
  if not finished:
    raise UserError(
      f"{flags.results}: {chosen.text} diverged with every learning rate that"
      " was tried; `pick` smaller ones"
    )
  means = _by(finished, "learning_rate")
  score = lambda rate: statistics.mean(
    evaluation.rank(task, r["scores"]) for r in means[rate]
  )
  return [min(means, key=score)]


def _own(flags: argparse.Namespace, chosen: Method) -> frozenset[str]:
  """The settings of a method's runs, whatever the rate and seed.

  Raises:
    UserError: they are to say what other flags say.
  """
  found = (*flags.settings, *chosen.settings)
  for setting in found:
    if setting.startswith(VARIED):
      raise UserError(
        f"--set {setting}: that is what --rates, --seeds, and `pick` or `run`"
        " say here"
      )
  return frozenset(found)


def _by(records: list[Record], name: str) -> dict[Any, list[Record]]:
  found: dict[Any, list[Record]] = {}
  for record in records:
    found.setdefault(record[name], []).append(record)
  return found


def plan(flags: argparse.Namespace) -> Iterator[tuple[Method, float, int]]:
  """The runs that are missing, seed by seed: a stop leaves a fair part."""
  done = {
    (r["stage"], r["checkpoint"], r["command"]) for r in read(flags.results)
  }
  for seed in flags.seeds:
    for chosen in map(method, flags.methods):
      for rate in rates(flags, chosen):
        command = shown(flags, words(flags, chosen, rate, seed))
        if (flags.command, flags.checkpoint, command) not in done:
          yield chosen, rate, seed


def shown(flags: argparse.Namespace, command: list[str]) -> str:
  """A run's command line, as it is kept."""
  # Where a checkpoint lies on this machine says nothing to others.
  named = ["$CHECKPOINT" if w == flags.source else w for w in command]
  return " ".join(["python -m train.finetune", *named])


LOOKS = 256


def fingerprint(source: str) -> str:
  """What tells a checkpoint from others, wherever it lies.

  Raises:
    UserError: there is none.
  """
  if source.startswith(HUB):
    return source
  path = pathlib.Path(source).expanduser()
  files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
  if not files:
    raise UserError(f"--from {source}: there are no weights")
  made = hashlib.blake2b(digest_size=8)
  for file in files:
    size = file.stat().st_size
    made.update(f"{file.name} {size}\n".encode())
    with file.open("rb") as opened:
      for part in range(LOOKS):  # some of all weights: a file may be large
        opened.seek(size * part // LOOKS)
        made.update(opened.read(2**14))
  return made.hexdigest()


def run_all(flags: argparse.Namespace) -> int:
  """Makes the runs that are missing; the first that fails ends it."""
  out = flags.work / flags.task
  flags.checkpoint = fingerprint(flags.source)
  for chosen, rate, seed in plan(flags):
    command = words(flags, chosen, rate, seed)
    # What a stop has left is of this run, which goes on with it, or goes.
    goes_on = _same(out, command) and not flags.overwrite
    anew = [] if goes_on else ["--overwrite"]
    try:
      status = finetune.command([*command, "--out", str(out), *anew])
    except Diverged as error:
      print(f"stopped: {error}\nnote       kept in {flags.results} as diverged")
      status = 0
    if status:
      return status
    flags.overwrite = False
    found = json.loads((out / report.FILE).read_text(encoding="utf-8"))
    record = {
      "stage": flags.command,
      "method": chosen.text,
      "checkpoint": flags.checkpoint,
      "examples": run_dir.examples_of(out),
    } | found
    record["command"] = shown(flags, command)
    flags.results.parent.mkdir(parents=True, exist_ok=True)
    with flags.results.open("a", encoding="utf-8") as file:
      file.write(json.dumps(record) + "\n")
    shutil.rmtree(out)
  return 0


def _same(out: pathlib.Path, command: list[str]) -> bool:
  """Whether the folder holds a part of this very run; notes it if not."""
  note = out.with_name(out.name + ".command")
  text = json.dumps(command)
  same = note.exists() and note.read_text() == text
  if not same:
    shutil.rmtree(out, ignore_errors=True)
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(text)
  return same


SIZES = ("weights", "adapters", "gradients", "optimizer", "optimizer_blocks")


def table(records: list[Record]) -> str:
  """The runs as Markdown, a table a task: mean and spread of scores, bytes.

  The loss tells methods apart where a score does not yet: it counts how sure
  the answers are, in runs too short for more than the commonest class.

  Beside a rate stands what it scored when it was picked, if it was tried then.
  """
  runs = [record for record in records if record["stage"] == "run"]
  if not runs:
    raise UserError("there is no finished run in the results")
  tasks_ = _by(runs, "task")
  picks = [record for record in records if record["stage"] == "pick"]
  table = lambda name: _table(
    name, tasks_[name], [pick for pick in picks if pick["task"] == name]
  )
  if len(tasks_) == 1:  # its name is in the file's
    return table(next(iter(tasks_)))
  return "\n\n".join(f"**{name}**\n\n{table(name)}" for name in tasks_)


def _table(task: str, runs: list[Record], picks: list[Record]) -> str:
  metric = tasks.find(task).metrics[0]
  tried: dict[tuple, list[Record]] = {}
  for pick in picks:
    tried.setdefault(_key(pick), []).append(pick)
  lines = [
    f"| method | learning rate | held out | {metric} | loss | seeds |"
    " weights, MB | adapters | gradients | optimizer state | of it blocks |",
    "|---" * 11 + "|",
  ]
  alike: dict[tuple, list[Record]] = {}  # but for their seeds
  for record in runs:
    alike.setdefault(_key(record), []).append(record)
  common = frozenset.intersection(*(settings for *_, settings in alike))
  several = len({checkpoint for _, _, checkpoint, _ in alike}) > 1
  for key, same in sorted(alike.items(), key=lambda item: item[0][:3]):
    name, rate, checkpoint, settings = key
    finished = [record for record in same if record["scores"]]
    sizes = finished[0]["bytes"] if finished else {}
    of_all = "" if len(finished) == len(same) else f" of {len(same)}"
    own = sorted(settings - common - set(method(name).settings))
    cells = [
      _title(name, [*own, *([checkpoint] if several else [])]),
      f"{rate:g}",
      _mean(tried[key], metric) if key in tried else "",
      _spread(finished, metric),
      _spread(finished, "held_out_loss"),
      f"{len(finished)}{of_all}",
      *(f"{sizes.get(part, 0) / 1e6:.2f}" for part in SIZES),
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _title(name: str, own: list[str]) -> str:
  """`galore:8, update_proj_gap=10`: a method and what its runs changed."""
  text, *settings = name.split("+")
  short = [setting.removeprefix(_group(setting)) for setting in settings]
  return " ".join([", ".join([text, *short]), *own])


def _group(setting: str) -> str:
  field, _, _ = setting.partition("=")
  return field[: field.rfind(".") + 1]


def _mean(records: list[Record], metric: str) -> str:
  """The mean of a score, if all runs came to one."""
  if not all(record["scores"] for record in records):
    return "diverged"
  return f"{statistics.mean(r['scores'][metric] for r in records):.4f}"


def _spread(records: list[Record], metric: str) -> str:
  """Mean and standard deviation of a score, of runs that came to one."""
  if not records:
    return "diverged"
  values = [record["scores"][metric] for record in records]
  spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
  return f"{statistics.mean(values):.4f}{spread}"


def _key(record: Record) -> tuple[str, float, str, frozenset[str]]:
  """What runs have in common that differ in their seeds alone."""
  settings = _settings(record)
  return (
    record["method"],
    record["learning_rate"],
    record["checkpoint"],
    settings,
  )


def _settings(record: Record) -> frozenset[str]:
  """What a run was set to, but for its learning rate and seed."""
  words_ = record["command"].split(" --set ")[1:]
  return frozenset(word for word in words_ if not word.startswith(VARIED))


def parse(given: list[str] | None) -> argparse.Namespace:
  """Reads the command line."""
  parser = argparse.ArgumentParser(
    prog="python -m train.experiments.finetune_grid",
    description="Fine-tunes with several methods, rates and seeds.",
  )
  commands = parser.add_subparsers(dest="command", required=True)
  for name in ("pick", "run", "table"):
    command = commands.add_parser(name)
    command.add_argument("results", type=pathlib.Path, metavar="RESULTS")
    if name == "table":
      continue
    command.add_argument("--from", dest="source", required=True)
    command.add_argument("--task", default="rotten_tomatoes")
    command.add_argument(
      "--methods", nargs="+", required=True, metavar="NAME:RANK"
    )
    command.add_argument("--rates", nargs="+", type=float, default=[])
    command.add_argument("--seeds", nargs="+", type=int, default=[0])
    command.add_argument("--set", action="append", default=[], dest="settings")
    command.add_argument(
      "--work",
      type=pathlib.Path,
      default=pathlib.Path("runs/grid"),
      help="folder of the run that is being made, one grid at a time;"
      " default: runs/grid",
    )
    command.add_argument(
      "--overwrite",
      action="store_true",
      help="begin a run that was stopped anew, where its data have changed",
    )
  return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
  """The command: 0 done, 1 diverged, 2 wrong input, 130 stopped."""
  flags = parse(given)
  if flags.command == "table":

    def show() -> int:
      print(table(read(flags.results)))
      return 0

    return exit_status.guarded(show)
  return exit_status.guarded(lambda: run_all(flags))


if __name__ == "__main__":
  sys.exit(main())
