"""Runs the marked blocks of README.md and docs/; checks links and reference.

Marks of a block, in a comment on the line above it:

- `runnable`: a block of Python, run by itself.
- `runnable: NAMES`: the same, in docs/recipes, for which packages are needed
  that may be missing. tests/recipes runs the blocks of that folder.
- `runnable in order`: Python or shell commands. The blocks of a page run one
  after the other in one temporary folder, with the settings of `TINY`.
- `runnable in order: NAMES`: the same, but left out if one of the packages is
  missing; the test is then reported as skipped, after the other blocks ran.
"""

import ast
import importlib.util
import itertools
import os
import pathlib
import re
import stat
import subprocess
import sys

import markdown_it
import pytest

import galore_optax

ROOT = pathlib.Path(__file__).parents[1]
MARK = re.compile(
  r"^<!-- runnable(?P<ordered> in order)?(?:: (?P<needs>[\w, ]+))? -->\n"
  r"```(?P<language>\w+)\n(?P<code>.*?)^```",
  re.S | re.M,
)
PAGES = (
  ROOT / "README.md",
  ROOT / "CHANGELOG.md",
  *sorted((ROOT / "docs").rglob("*.md")),
)
NAMES = {page: str(page.relative_to(ROOT)) for page in PAGES}
MARKED = {
  page: list(MARK.finditer(page.read_text(encoding="utf-8"))) for page in PAGES
}
RECIPES = ROOT / "docs" / "recipes"
BLOCKS = {
  f"{NAMES[page]}:{i}": code
  for page, marked in MARKED.items()
  if page.parent != RECIPES
  for i, code in enumerate(x["code"] for x in marked if not x["ordered"])
}
TRAINING = (
  "docs/how-to/save-memory.md:1",
  "docs/how-to/save-memory.md:2",
)
# Pages with commands; the blocks of a page share a folder.
WALKS = [
  page for page, marked in MARKED.items() if any(x["ordered"] for x in marked)
]
# What is added to a command of a page, so that it takes seconds.
TINY = {
  "train.pretrain": "--set model.d_model=32 --set model.d_ff=48"
  " --set model.n_layers=1 --set model.n_heads=2 --set model.vocab_size=300"
  " --set optimizer.rank=8 --set data.path=tiny.txt --set data.length=32"
  " --set train.steps=4 --set run.watch=none --set run.sample_tokens=0",
  "train.finetune": "--set task.epochs=1 --set data.length=128",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_runnable_blocks_run(name, capsys):
  namespace = {"__name__": "__main__"}
  exec(compile(BLOCKS[name], name, "exec"), namespace)
  if name in TRAINING:
    assert namespace["losses"][-1] < 0.5 * namespace["losses"][0]


def test_every_mark_is_that_of_a_block():
  for page, marked in MARKED.items():
    marks = page.read_text(encoding="utf-8").count("<!-- runnable")
    assert marks == len(marked), f"{NAMES[page]}: a mark without a block"
  assert set(TRAINING) <= set(BLOCKS)


def shim(folder):
  """A `python` that adds the settings of `TINY`, in a folder for PATH."""
  cases = "\n".join(
    f'  "-m {name}") exec "{sys.executable}" "$@" {flags} ;;'
    for name, flags in TINY.items()
  )
  file = folder / "python"
  file.write_text(
    f'#!/bin/sh\ncase "$1 $2" in\n{cases}\nesac\n'
    f'exec "{sys.executable}" "$@"\n',
    encoding="utf-8",
  )
  file.chmod(file.stat().st_mode | stat.S_IXUSR)
  return folder


def prose(count):
  """Sentences, enough for a held-out part."""
  return "\n\n".join(
    f"In the year {i} the people of these states held that the union is one,"
    f" and that peace among its {i % 7} parts is for all of them."
    for i in range(count)
  )


def needs(block):
  """Packages without which a block is left out."""
  return re.findall(r"\w+", block["needs"] or "")


def is_missing(package):
  return importlib.util.find_spec(package) is None


@pytest.mark.slow  # `.ci/run` runs it by itself
@pytest.mark.parametrize("page", WALKS, ids=lambda page: NAMES[page])
def test_commands_run_in_the_order_of_the_page(page, tmp_path):
  work, binaries = tmp_path / "work", tmp_path / "bin"
  work.mkdir()
  binaries.mkdir()
  (work / "tiny.txt").write_text(prose(300), encoding="utf-8")
  environment = os.environ | {
    "PATH": f"{shim(binaries)}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
  }
  for block in MARKED[page]:
    if not block["ordered"] or any(map(is_missing, needs(block))):
      continue
    command = ("bash", "-euo", "pipefail", "-c", block["code"])
    if block["language"] == "python":
      command = (sys.executable, "-c", block["code"])
    done = subprocess.run(
      command, cwd=work, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{block['code']}\n{done.stdout}{done.stderr}"
  wanted = set(itertools.chain.from_iterable(map(needs, MARKED[page])))
  missing = sorted(filter(is_missing, wanted))
  if missing:
    pytest.skip(
      f"the other blocks ran; those that need {', '.join(missing)} were left"
      " out: install the extra `parity`"
    )


def parsed(path):
  return (
    markdown_it.MarkdownIt("commonmark")
    .enable("table")
    .parse(path.read_text(encoding="utf-8"))
  )


def anchors(path):
  """Names that a page's headings have on the web: words joined by hyphens.

  A page of the reference also has one for each object that it documents.
  """
  tokens = parsed(path)
  headings = {
    re.sub(r"[^\w\- ]", "", text.content.lower()).replace(" ", "-")
    for opening, text in itertools.pairwise(tokens)
    if opening.type == "heading_open"
  }
  return headings | set(documented(path))


def links(path):
  """Where a page's links and pictures lead within the repository."""
  inline = [part for token in parsed(path) for part in token.children or ()]
  targets = [part.attrGet("href") or part.attrGet("src") for part in inline]
  return [x for x in targets if x and "://" not in x]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: NAMES[page])
def test_links_lead_somewhere(page):
  for link in links(page):
    name, _, anchor = link.partition("#")
    there = (page.parent / name) if name else page
    assert there.exists(), f"{page.name}: no file for {link}"
    assert not anchor or anchor in anchors(there), (
      f"{page.name}: no heading for {link}"
    )


def test_links_are_found():
  assert sum(map(len, map(links, PAGES))) > 50


def documented(path):
  """Objects that a page of the reference documents, by their full names."""
  return re.findall(r"^::: (\S+)$", path.read_text(encoding="utf-8"), re.M)


REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))


def test_the_reference_has_every_public_name_once():
  in_pages = itertools.chain.from_iterable(map(documented, REFERENCE))
  public = [f"galore_optax.{x}" for x in galore_optax.__all__]
  public.remove("galore_optax.baselines")
  public += [
    f"galore_optax.baselines.{x}" for x in galore_optax.baselines.__all__
  ]
  assert sorted(in_pages) == sorted(public)


def test_the_site_lists_every_page():
  text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
  listed = re.findall(r"^ +- (?:[\w ]+: )?(\S+\.md)$", text, re.M)
  pages = [str(x.relative_to(ROOT / "docs")) for x in PAGES[2:]]
  assert sorted(listed) == sorted(pages)


def units(package):
  """Rows of the table of docs/index.md that tells where things are."""
  text = (ROOT / "docs/index.md").read_text(encoding="utf-8")
  table = text.partition(f"| in `{package}/` |")[2].partition("\n\n")[0]
  rows = [line.split("|")[1] for line in table.splitlines()[2:]]
  return [
    [name.removesuffix("/").removesuffix(".py") for name in names]
    for names in (re.findall(r"`([^`]+)`", row) for row in rows)
  ]


def imported(package, unit):
  """Files and folders of a package that one of them imports."""
  root = ROOT / package
  files = [root / f"{unit}.py", *(root / unit).rglob("*.py")]
  for file in filter(pathlib.Path.is_file, files):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
      if isinstance(node, ast.ImportFrom) and node.module == package:
        yield from (alias.name for alias in node.names)
      elif isinstance(node, ast.ImportFrom) and node.module:
        first, _, rest = node.module.partition(".")
        if first == package:
          yield rest.partition(".")[0]


@pytest.mark.parametrize("package", ["galore_optax", "train"])
def test_imports_go_up_the_table_of_the_index(package):
  rows = units(package)
  listed = list(itertools.chain.from_iterable(rows))
  present = {
    path.stem
    for path in (ROOT / package).iterdir()
    if (path / "__init__.py").is_file()
    or (package == "galore_optax" and path.suffix == ".py")
  }
  assert sorted(listed) == sorted(present - {"__init__"}), (
    "docs/index.md lists other files and folders than there are"
  )
  for i, unit in enumerate(listed):
    below = set(imported(package, unit)) & set(listed[i + 1 :])
    assert not below, (
      f"{package}: {unit} imports {sorted(below)}, which docs/index.md lists"
      " below it"
    )


@pytest.mark.skipif(
  is_missing("mkdocstrings"),
  reason="the site needs the extra `docs`",
)
@pytest.mark.slow
def test_the_site_builds(tmp_path):
  done = subprocess.run(
    (sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path),
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  page = (tmp_path / "reference" / "galore.html").read_text(encoding="utf-8")
  assert 'id="galore_optax.galore"' in page and "<math" in page
  for left in (":func:", ":class:", ":math:", ".. math::", "arithmatex"):
    assert left not in page


def test_results_of_the_readme_are_those_of_the_evidence():
  pattern = re.compile(r"^\| (.+?) \| ([\d.]+) ± ([\d.]+) \|(.*)\|$", re.M)
  evidence = (ROOT / "docs/results/evidence.md").read_text(encoding="utf-8")
  methods = evidence.partition("<!-- length: begin -->")[2]
  methods = methods.partition("<!-- length: end -->")[0]
  measured = {
    name: (float(mean), float(std), float(rest.split("|")[4]))
    for name, mean, std, rest in pattern.findall(methods)
  }
  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  rows = pattern.findall(readme.partition("<!-- evidence -->")[2])
  assert len(rows) == 11
  for name, mean, std, state in rows:
    expected = measured[name]
    assert abs(float(mean) - expected[0]) <= 0.0051
    assert abs(float(std) - expected[1]) <= 0.0051
    assert abs(float(state) - expected[2]) <= 0.0051
