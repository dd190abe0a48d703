"""The page of evidence: tables between markers, from the finished runs.

    <!-- methods: begin -->
    ...
    <!-- methods: end -->

What lies between is replaced; everything else on the page is written by hand.
`<!-- methods_grid: begin -->` marks the place of a table's whole search.
"""

import collections
import math
import pathlib
import re
import statistics
from collections.abc import Callable, Mapping, Sequence

from train.common import atomic_files
from train.common.errors import UserError
from train.experiments import figures, mechanism, results, speed, stability
from train.experiments.plan import Plan, Point, Record
from train.experiments.tables import TABLES, Entry, Line, Table

PAGE = pathlib.Path("docs/results/evidence.md")
GRID = "_grid"
_MARKED = re.compile(
  r"(<!-- (?P<name>\w+): begin -->\n).*?(<!-- (?P=name): end -->)", re.DOTALL
)
HEAD = (
  "",
  "perplexity",
  "against the first row",
  "on the seeds without the search",
  "seeds",
  "optimizer state, MiB",
  "of the first row",
  "weights, MiB",
  "step, of the first row's",
  "learning rate",
  "multiplier",
  "points searched",
)


def write(folder: pathlib.Path, page: pathlib.Path) -> None:
  """Rewrites the tables of a page, and its figures in `evidence/` beside it.

  Args:
    folder: of the results.
    page: a Markdown file with markers.

  Raises:
    UserError: the page cannot be read, or has no markers of a table.
  """
  try:
    text = page.read_text(encoding="utf-8")
  except OSError as error:
    raise UserError(f"--page {page}: cannot read ({error})") from None
  found = results.read_all(folder)
  new, places = render(text, folder, found)
  if not places:
    raise UserError(
      f"--page {page}: no place for tables, such as a line"
      " <!-- methods: begin --> and a line <!-- methods: end -->"
    )
  looks = mechanism.load(folder)
  if looks:
    mechanism.draw(looks, page.parent / "evidence")
  for table in TABLES.values():
    for plan in plans(table, folder, found):
      figures.draw(plan, page.parent / "evidence")
  atomic_files.write_text(page, new)
  print(f"wrote {page}, {places} places, from {len(found)} runs")


def render(
  text: str, folder: pathlib.Path, found: dict[str, Record]
) -> tuple[str, int]:
  """The page's text with tables of what was found, and how many places.

  Args:
    text: the page.
    folder: of the results.
    found: all runs by their keys.
  """
  places = 0

  def fill(hit: re.Match) -> str:
    nonlocal places
    name = hit["name"].removesuffix(GRID)
    if name == "mechanism":
      body = _mechanism(folder)
    elif name in TABLES:
      whole = lambda plan: section(plan, folder)
      part = grid if hit["name"].endswith(GRID) else whole
      body = _sections(TABLES[name], folder, found, part)
    else:
      return hit[0]
    places += 1
    return f"{hit[1]}\n{body}\n\n{hit[3]}"

  return _MARKED.sub(fill, text), places


def plans(
  table: Table, folder: pathlib.Path, found: dict[str, Record]
) -> list[Plan]:
  """A plan for each text and size that runs of the table have, longest first.

  What is shared with another table does not make a size of this one.
  """
  own = results.read(folder / f"{table.name}.jsonl")
  sizes = sorted({(-r["tokens"], r["text"]) for r in own})
  return [Plan(table, -size, text, found) for size, text in sizes]


def _sections(
  table: Table,
  folder: pathlib.Path,
  found: dict[str, Record],
  part: Callable[[Plan], str],
) -> str:
  parts = [part(plan) for plan in plans(table, folder, found)]
  if not parts:
    return f"Not measured yet: `python -m train.experiments run {table.name}`."
  return "\n\n".join(parts)


def _mechanism(folder: pathlib.Path) -> str:
  found = mechanism.load(folder)
  if not found:
    return "Not measured yet: `python -m train.experiments mechanism`."
  return mechanism.text(found)


def section(plan: Plan, folder: pathlib.Path) -> str:
  """A table, its pictures and where it comes from."""
  pictures = [
    f"![{title}](evidence/{path})" for path, title in figures.names(plan)
  ]
  times = speed.ratios(folder, plan.table.name)
  parts = [_title(plan), table(plan, times)]
  if plan.table.is_long:
    parts.append(_markdown(stability.HEAD, stability.rows(plan)))
  return "\n\n".join([*parts, origin(plan), *pictures])


def _title(plan: Plan) -> str:
  full = plan.tokens >= plan.table.tokens
  short = (
    "" if full else f", {plan.tokens / plan.table.tokens:.0%} of full size"
  )
  text = plan.text if plan.text.isalnum() else pathlib.Path(plan.text).name
  return f"**{plan.table.title}, {plan.tokens:,} tokens a run{short}, {text}**"


def table(plan: Plan, times: Mapping[str, float] | None = None) -> str:
  """Perplexity on the text that nothing was selected by, and what it took.

  Args:
    plan: the table with its runs.
    times: of a step by the names of entries, of the first one's.
  """
  base = plan.table.entries[0]
  first = plan.seeds(base) if plan.complete(base) else []
  rows = [_row(plan, entry, first, times or {}) for entry in plan.table.entries]
  return _markdown(HEAD, rows)


def _row(
  plan: Plan, entry: Entry, first: list[Record], times: Mapping[str, float]
) -> list[str]:
  found, point = plan.seeds(entry), plan.chosen(entry)
  if point is None or not found:
    return [entry.label, "not measured yet", *[""] * (len(HEAD) - 2)]
  whole = plan.complete(entry)
  done = [r for r in found if r["status"] == "done"]
  size = found[0]["bytes"]["optimizer"]
  others = [r for r in done if r["seed"] != plan.table.seeds[0]]
  note = "seeds not done" if plan.searched(entry) else "search not done"
  return [
    entry.label,
    # Nothing that is not tuned stands beside what is.
    _perplexity(found, done) if whole else note,
    _paired(done, first) if whole else "",
    _paired(others, first) if whole else "",
    f"{len(found) if whole else 0} of {len(plan.table.seeds)}",
    f"{size / 2**20:.2f}",
    f"{size / first[0]['bytes']['optimizer']:.0%}" if first else "",
    f"{found[0]['bytes']['weights'] / 2**20:.2f}",
    f"{times[entry.name]:.2f}" if entry.name in times else "",
    f"{point[0]:g}{_edge(point[0], plan.table.rates)}" if whole else "",
    f"{point[1]:g}{_edge(point[1], plan.table.multipliers)}" if whole else "",
    f"{len(plan.tried(entry))}{'' if whole else ' so far'}",
  ]


def _perplexity(found: list[Record], done: list[Record]) -> str:
  if not done:
    return "diverged"
  values = [perplexity(r["test_loss"]) for r in done]
  lost = len(found) - len(done)
  note = f", {lost} diverged" if lost else ""
  return f"{_spread(values, '{:.2f}')}{note}"


def perplexity(loss: float) -> float:
  """Of a loss in nats a token; finite whatever the loss is."""
  return math.exp(min(loss, 700))


def _paired(done: list[Record], first: list[Record]) -> str:
  """How much lower or higher, seed by seed on the same batches."""
  base = {r["seed"]: r["test_loss"] for r in first if r["status"] == "done"}
  shared = [r for r in done if r["seed"] in base]
  changes = [100 * math.expm1(r["test_loss"] - base[r["seed"]]) for r in shared]
  return f"{_spread(changes, '{:+.1f}')} %" if changes else ""


def _spread(values: Sequence[float], style: str) -> str:
  mean = style.format(statistics.mean(values))
  if len(values) < 2:
    return mean
  return f"{mean} ± {statistics.stdev(values):.2g}"


def _edge(value: float, line: Line) -> str:
  """A star where a better value may lie outside of what is searched."""
  values = line.values()
  at_edge = len(values) > 1 and value in (values[0], values[-1])
  return "\\*" if at_edge else ""


def grid(plan: Plan) -> str:
  """Every point that was tried, with its validation perplexity."""
  rows = [
    [
      entry.label,
      f"{point[0]:g}",
      f"{point[1]:g}",
      *_scores(plan, entry, point),
    ]
    for entry in plan.table.entries
    for point in plan.tried(entry)
  ]
  first = plan.table.seeds[0]
  head = ("", "learning rate", "multiplier", f"seed {first}", "all seeds", "")
  return f"{_title(plan)}\n\n{_markdown(head, rows)}"


def _scores(plan: Plan, entry: Entry, point: Point) -> list[str]:
  """Of the first seed and, where there are others, of all; what it was for."""
  records_ = [plan.record(entry, point, seed) for seed in plan.table.seeds]
  found = [
    perplexity(r["validation_loss"]) if r["status"] == "done" else math.inf
    for r in records_
    if r
  ]
  shown = [f"{x:.2f}" if math.isfinite(x) else "diverged" for x in found]
  several = math.isfinite(sum(found)) and len(found) > 1
  chosen = "chosen" if plan.complete(entry) else "best so far"
  return [
    shown[0],
    f"{_spread(found, '{:.2f}')}, {len(found)} seeds" if several else "",
    chosen if point == plan.chosen(entry) else "",
  ]


def origin(plan: Plan) -> str:
  """Where the numbers of a table come from, and how many are missing."""
  own = [r for r in plan.found.values() if _belongs(r, plan)]
  machines_ = sorted({_machine(r) for r in own})
  steps = sorted({r["steps"] for r in own})
  command = f"python -m train.experiments run {plan.table.name}"
  command += f" --tokens {plan.tokens} --text {plan.text}"
  dates = sorted({r["date"] for r in own})
  commits = collections.Counter(r["versions"].get("commit", "") for r in own)
  return (
    f"`{command}`: {plan.done()} of about {plan.total} runs are there."
    f" {plan.tokens:,} tokens and {'/'.join(map(str, steps))} steps a run;"
    f" seeds {', '.join(map(str, plan.table.seeds))}; {'; '.join(machines_)};"
    f" {' to '.join(dict.fromkeys((dates[0], dates[-1])))};"
    f" {_commits(commits)}."
    " ± is the standard deviation over seeds; \\* marks a value at the edge of"
    " the search."
  )


def _commits(counts: Mapping[str, int]) -> str:
  named = ", ".join(sorted(commit[:7] for commit in counts if commit))
  unnamed = counts.get("", 0)
  return " and ".join(
    ([f"commits {named}"] if named else [])
    + ([f"{unnamed} runs whose commit was not noted"] if unnamed else [])
  )


def _belongs(found: Record, plan: Plan) -> bool:
  return (found["tokens"], found["text"]) == (plan.tokens, plan.text)


def _machine(found: Record) -> str:
  machine, versions = found["machine"], found["versions"]
  return (
    f"{machine['processor']}, {machine['cores']} cores,"
    f" jax {versions['jax']}, optax {versions['optax']}"
  )


def _markdown(head: Sequence[str], rows: list[list[str]]) -> str:
  lines = [list(head), ["---", *["--:"] * (len(head) - 1)], *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)
