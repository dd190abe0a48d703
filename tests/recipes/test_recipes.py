"""Runs the programs of docs/recipes whose packages are installed.

The extra `recipes` installs some of them; docs/recipes/index.md says how the
others are run.
"""

import pytest

from tests import test_docs

INDEX = test_docs.RECIPES / "index.md"
PAGES = sorted(set(test_docs.RECIPES.glob("*.md")) - {INDEX})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_recipe_runs(page):
  (block,) = test_docs.MARKED[page]
  missing = list(filter(test_docs.is_missing, test_docs.needs(block)))
  if missing:
    pytest.skip(f"not installed: {', '.join(missing)}")
  assert "assert " in block["code"], "nothing is checked"
  namespace = {"__name__": "__main__"}
  exec(compile(block["code"], str(page), "exec"), namespace)


def test_the_table_lists_every_recipe():
  table = INDEX.read_text(encoding="utf-8").partition("| recipe |")[2]
  for page in PAGES:
    assert f"]({page.name}) |" in table.partition("\n\n")[0]
