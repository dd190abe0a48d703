"""Rewrites the tables of the evidence page from the records of finished runs.

The section `<!-- methods: begin -->` of the page holds the table `methods`,
`<!-- methods_grid: begin -->` all points of its search, and
`<!-- mechanism: begin -->` the spectra of gradients. See train/measure/page.py.
"""

import collections
import math
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence

from train.common import units
from train.experiments import figures, mechanism, results, speed, stability
from train.experiments.plan import Plan, Point, Record, perplexity
from train.experiments.table import SearchRange, Table, Variant
from train.experiments.tables import TABLES
from train.measure import page as page_lib
from train.measure.tables import markdown_table

PAGES = (
  pathlib.Path("docs/results/evidence.md"),
  pathlib.Path("docs/results/short-runs.md"),
)
GRID = "_grid"
HEAD = (
  "",
  "perplexity",
  "difference to the first row",
  "difference without the search's seed",
  "seeds",
  "optimizer state, MiB",
  "state / first row's",
  "weights, MiB",
  "step time / first row's",
  "learning rate",
  "multiplier",
  "points searched",
)


def write(folder: pathlib.Path, pages: Sequence[pathlib.Path] = PAGES) -> None:
  """Rewrites the tables of pages, and their figures in `evidence/` beside them.

  Args:
    folder: Folder of the records.
    pages: Markdown files with marked sections.

  Raises:
    UserError: A page cannot be read, or has no section of a table.
  """
  records = results.read_all(folder)
  render = lambda name: section(name, folder, records)
  for page in pages:
    count = page_lib.rewrite(page, render, "methods")
    print(f"wrote {count} sections of {page} from {len(records)} runs")
  images = pages[0].parent / "evidence"
  if measured := mechanism.load(folder):
    mechanism.draw(measured, images)
  for table in TABLES.values():
    for plan in plans(table, folder, records):
      figures.draw(plan, images, speed.ratios(folder, table.name))


def section(
  name: str, folder: pathlib.Path, records: dict[str, Record]
) -> str | None:
  """The text of a section of the page; None if its name is unknown.

  Args:
    name: The section's name.
    folder: Folder of the records.
    records: The records of all runs by key.
  """
  if name == "mechanism":
    measured = mechanism.load(folder)
    if not measured:
      return "Not measured yet: `python -m train.experiments mechanism`."
    return mechanism.text(measured)
  table = TABLES.get(name.removesuffix(GRID))
  if table is None:
    return None
  render: Callable[[Plan], str] = (
    grid if name.endswith(GRID) else lambda plan: evidence(plan, folder)
  )
  parts = [render(plan) for plan in plans(table, folder, records)]
  if not parts:
    return f"Not measured yet: `python -m train.experiments run {table.name}`."
  return "\n\n".join(parts)


def plans(
  table: Table, folder: pathlib.Path, records: dict[str, Record]
) -> list[Plan]:
  """A plan for each text and size of the table's own runs, longest runs first.

  A run that is shared with another table does not add a size to this one.
  """
  own = results.read(folder / f"{table.name}.jsonl")
  sizes = sorted({(-r["tokens"], r["text"]) for r in own})
  return [Plan(table, -size, text, records) for size, text in sizes]


def evidence(plan: Plan, folder: pathlib.Path) -> str:
  """A table with its title, its origin and its figures."""
  images = [
    f"![{title}](evidence/{path})" for path, title in figures.names(plan)
  ]
  times = speed.ratios(folder, plan.table.name)
  parts = [_title(plan), table(plan, times)]
  if plan.table.is_long:
    parts.append(markdown_table(stability.HEAD, stability.rows(plan)))
  return "\n\n".join([*parts, origin(plan), *images])


def _title(plan: Plan) -> str:
  share = plan.tokens / plan.table.tokens
  size = "" if share >= 1 else f", {share:.0%} of full size"
  text = plan.text if plan.text.isalnum() else pathlib.Path(plan.text).name
  return f"**{plan.table.title}, {plan.tokens:,} tokens per run{size}, {text}**"


def table(plan: Plan, times: Mapping[str, float] | None = None) -> str:
  """The table of test perplexities and of what each variant takes.

  Args:
    plan: The table and its runs.
    times: Step times relative to the first variant's, by name of the variant.
  """
  base = plan.table.variants[0]
  first = plan.chosen_records(base) if plan.complete(base) else []
  rows = [
    _row(plan, variant, first, times or {}) for variant in plan.table.variants
  ]
  if not plan.table.other:
    return markdown_table(HEAD, rows)
  others = (
    _other(plan, variant) if plan.complete(variant) else ""
    for variant in plan.table.variants
  )
  rows = [
    [*row[:2], other, *row[2:]] for row, other in zip(rows, others, strict=True)
  ]
  return markdown_table((*HEAD[:2], f"on {plan.table.other}", *HEAD[2:]), rows)


def _other(plan: Plan, variant: Variant) -> str:
  """The perplexity on the table's other text."""
  records = plan.chosen_records(variant)
  values = [
    perplexity(record["other_loss"])
    for record in records
    if record["status"] == "done"
  ]
  return _mean_and_std(values, "{:.2f}") if values else ""


def _row(
  plan: Plan, variant: Variant, first: list[Record], times: Mapping[str, float]
) -> list[str]:
  """A variant's row; what is not fully searched shows no perplexity."""
  records, point = plan.chosen_records(variant), plan.chosen(variant)
  if point is None or not records:
    return [variant.label, "not measured yet", *[""] * (len(HEAD) - 2)]
  tried = len(plan.tried(variant))
  rest = [
    *_sizes(records[0], first),
    f"{times[variant.name]:.2f}" if variant.name in times else "",
  ]
  if not plan.complete(variant):
    note = "seeds not done" if plan.searched(variant) else "search not done"
    seeds = f"0 of {len(plan.table.seeds)}"
    unknown = ["", ""]
    points = f"{tried} so far"
    return [variant.label, note, *unknown, seeds, *rest, *unknown, points]
  done = [r for r in records if r["status"] == "done"]
  others = [r for r in done if r["seed"] != plan.table.seeds[0]]
  return [
    variant.label,
    _perplexity(records, done),
    _relative(done, first),
    _relative(others, first),
    f"{len(records)} of {len(plan.table.seeds)}",
    *rest,
    f"{point[0]:g}{_edge(point[0], plan.table.rates)}",
    f"{point[1]:g}{_edge(point[1], plan.table.multipliers)}",
    str(tried),
  ]


def _sizes(record: Record, first: list[Record]) -> list[str]:
  """MiB of state, its ratio to the first row's, and MiB of weights."""
  state = record["bytes"]["optimizer"]
  return [
    units.format_mib(state),
    f"{state / first[0]['bytes']['optimizer']:.0%}" if first else "",
    units.format_mib(record["bytes"]["weights"]),
  ]


def _perplexity(records: list[Record], done: list[Record]) -> str:
  if not done:
    return "diverged"
  values = [perplexity(r["test_loss"]) for r in done]
  lost = len(records) - len(done)
  note = f", {lost} diverged" if lost else ""
  return f"{_mean_and_std(values, '{:.2f}')}{note}"


def _relative(done: list[Record], first: list[Record]) -> str:
  """Difference in perplexity to the first row's runs with the same seed."""
  base = {r["seed"]: r["test_loss"] for r in first if r["status"] == "done"}
  shared = [r for r in done if r["seed"] in base]
  changes = [100 * math.expm1(r["test_loss"] - base[r["seed"]]) for r in shared]
  return f"{_mean_and_std(changes, '{:+.1f}')} %" if changes else ""


def _mean_and_std(values: Sequence[float], style: str) -> str:
  """The mean, and the standard deviation if there are several values."""
  mean = style.format(statistics.mean(values))
  if len(values) < 2:
    return mean
  return f"{mean} ± {statistics.stdev(values):.2g}"


def _edge(value: float, searched: SearchRange) -> str:
  """A star for a value at the edge of its range, where the search ends."""
  values = searched.values()
  at_edge = len(values) > 1 and value in (values[0], values[-1])
  return "\\*" if at_edge else ""


def grid(plan: Plan) -> str:
  """The table of all points that were tried, with validation perplexities."""
  rows = [
    [
      variant.label,
      f"{point[0]:g}",
      f"{point[1]:g}",
      *_scores(plan, variant, point),
    ]
    for variant in plan.table.variants
    for point in plan.tried(variant)
  ]
  first = plan.table.seeds[0]
  head = ("", "learning rate", "multiplier", f"seed {first}", "all seeds", "")
  return f"{_title(plan)}\n\n{markdown_table(head, rows)}"


def _scores(plan: Plan, variant: Variant, point: Point) -> list[str]:
  """Perplexity of the first seed and of all seeds, and whether it is chosen."""
  by_seed = [plan.record(variant, point, seed) for seed in plan.table.seeds]
  values = [
    perplexity(r["validation_loss"]) if r["status"] == "done" else math.inf
    for r in by_seed
    if r
  ]
  first = f"{values[0]:.2f}" if math.isfinite(values[0]) else "diverged"
  several = math.isfinite(sum(values)) and len(values) > 1
  label = "chosen" if plan.complete(variant) else "best so far"
  return [
    first,
    f"{_mean_and_std(values, '{:.2f}')}, {len(values)} seeds"
    if several
    else "",
    label if point == plan.chosen(variant) else "",
  ]


def origin(plan: Plan) -> str:
  """Where the numbers of a table come from, and how many runs are missing."""
  own = [r for r in plan.records.values() if _belongs(r, plan)]
  machines = sorted({_machine(r) for r in own})
  steps = sorted({r["steps"] for r in own})
  command = f"python -m train.experiments run {plan.table.name}"
  command += f" --tokens {plan.tokens} --text {plan.text}"
  dates = sorted({r["date"] for r in own})
  commits = collections.Counter(r["versions"].get("commit", "") for r in own)
  return (
    f"`{command}`: {plan.done()} of about {plan.total} runs are done."
    f" {plan.tokens:,} tokens and {'/'.join(map(str, steps))} steps per run;"
    f" seeds {', '.join(map(str, plan.table.seeds))}; {'; '.join(machines)};"
    f" {' to '.join(dict.fromkeys((dates[0], dates[-1])))};"
    f" {_commits(commits)}."
    " ± is the standard deviation over seeds; \\* marks a value at the edge of"
    " the search."
  )


def _commits(counts: Mapping[str, int]) -> str:
  named = ", ".join(sorted({commit[:7] for commit in counts if commit}))
  unnamed = counts.get("", 0)
  return " and ".join(
    ([f"commits {named}"] if named else [])
    + ([f"{unnamed} runs of unrecorded commits"] if unnamed else [])
  )


def _belongs(record: Record, plan: Plan) -> bool:
  return (record["tokens"], record["text"]) == (plan.tokens, plan.text)


def _machine(record: Record) -> str:
  machine, versions = record["machine"], record["versions"]
  cores = machine["cores"]
  return (
    f"{machine['processor']}, {cores} core{'s' * (cores != 1)},"
    f" jax {versions['jax']}, optax {versions['optax']}"
  )
