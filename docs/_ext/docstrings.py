"""Turns the Sphinx markup of docstrings into Markdown.

Docstrings are written as Optax writes them: Google style, with roles such as
:func:`galore_optax.galore`, `.. math::` blocks and reStructuredText links.
mkdocstrings renders Markdown.
"""

import logging
import re
import textwrap

import griffe

PACKAGE = "galore_optax"
# Warnings of this logger fail `mkdocs build --strict`.
LOG = logging.getLogger("mkdocs.plugins.docstrings")
EXAMPLE = re.compile(r"^Example:$", re.M)  # griffe knows the plural only
MATH = re.compile(r":math:`([^`]+)`")
REFERENCES = re.compile(r"^References:\n((?:\n| +\S.*(?:\n|$))+)", re.M)
BLOCK = re.compile(
  r"^(?P<indent> *)\.\. math::\n(?P<body>(?:\s*\n|(?P=indent) +\S.*\n?)+)", re.M
)
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|obj):`~?([\w.]+)`")
# What a public name looks like: one level below a namespace.
PUBLIC = re.compile(rf"{PACKAGE}\.(baselines\.)?[^.]+")
LINK = re.compile(r"`([^`<]+?)\s*<(https?://[^>`]+)>`__?")


class SphinxMarkup(griffe.Extension):
  """Rewrites each docstring of the package when its object is loaded."""

  def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
    """Rewrites all docstrings of a package.

    Args:
      pkg: The package, with all its modules loaded.
      **kwargs: Not used.
    """
    public = public_paths(pkg)
    todo: list[griffe.Object] = [pkg]
    while todo:
      item = todo.pop()
      if item.docstring:
        item.docstring.value = to_markdown(item.docstring.value, item, public)
      todo += [x for x in item.members.values() if not x.is_alias]


def public_paths(pkg: griffe.Module) -> dict[str, str]:
  """Maps where a public object is defined to the name it is documented by."""
  public = {}
  for namespace in (pkg, pkg.members.get("baselines")):
    if namespace is None or namespace.is_alias:
      continue
    for name in namespace.exports or ():
      member = namespace.members.get(str(name))
      if member is None:
        continue
      target = member.target_path if member.is_alias else member.path
      while target != (further := _follow(pkg, target)):
        target = further
      public.setdefault(target, f"{namespace.path}.{name}")
  return public


def _follow(pkg: griffe.Module, path: str) -> str:
  """One step from a name that was imported to where it was imported from."""
  try:
    item = pkg.modules_collection[path]
  except KeyError:
    return path
  return item.target_path if item.is_alias else path


def to_markdown(text: str, item: griffe.Object, public: dict[str, str]) -> str:
  """Rewrites one docstring.

  Args:
    text: The docstring, its indentation removed.
    item: The object it documents.
    public: See `public_paths`.
  """
  text = EXAMPLE.sub("Examples:", text)
  text = REFERENCES.sub(
    lambda match: f"**References:** {textwrap.dedent(match[1])}", text
  )
  text = BLOCK.sub(_display, text + "\n").rstrip("\n")
  text = MATH.sub(lambda match: rf"\({match[1]}\)", text)
  text = LINK.sub(
    lambda match: f"[{' '.join(match[1].split())}]({match[2]})", text
  )
  return ROLE.sub(lambda match: _reference(match[1], item, public), text)


def _display(match: re.Match[str]) -> str:
  """A `.. math::` block as one between dollars."""
  body = textwrap.dedent(match["body"]).strip()
  if "&" in body or r"\\" in body:
    body = rf"\begin{{split}}{body}\end{{split}}"
  lines = ["$$", *body.splitlines(), "$$"]
  indent = match["indent"]
  return "\n".join(f"{indent}{line}" for line in lines) + "\n\n"


def _reference(target: str, item: griffe.Object, public: dict[str, str]) -> str:
  """A link to a documented object; the name alone for one that is internal."""
  for path in (target, *_candidates(target, item)):
    for known in (public.get(path), path if path in public.values() else None):
      if known:
        return f"[`{target.removeprefix(PACKAGE + '.')}`][{known}]"
  if PUBLIC.fullmatch(target):
    LOG.warning("%s refers to %s, which is not public", item.path, target)
  return f"`{target}`"


def _candidates(target: str, item: griffe.Object) -> list[str]:
  """Full paths that a relative name can stand for, the innermost first."""
  paths = [f"{PACKAGE}.{target}", f"{PACKAGE}.baselines.{target}"]
  scope = item if item.is_module or item.is_class else item.parent
  while scope is not None:
    member = scope.members.get(target)
    if member is not None:
      paths.insert(0, member.target_path if member.is_alias else member.path)
    scope = scope.parent
  return paths
