"""Runs the blocks of docs/recipes whose packages are installed.

With the extra `recipes` the tests run more of them. The blocks of trainers that
have versions of their own of many packages run in an environment each:

  pip install -e . google-tunix pytest markdown-it-py
  pytest -n 0 tests/recipes
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
