"""Renders a chat template in a process of its own: jinja's sandbox, and limits.

The template is that of a checkpoint: a program of somebody else. The sandbox
keeps it from Python's objects. The limits keep it from taking all memory and
from writing files, and the parent ends a process that takes too long.

It reads lines of JSON and answers each with a line: first the template, then
the variables of one rendering after the other. It imports nothing of the
package, so that it starts at once.
"""

import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

MEMORY = 2**30  # bytes


class Refusal(Exception):
  """A template refuses a conversation."""


class Generation(jinja2.ext.Extension):
  """`{% generation %}`, which marks what a model writes: here, as it is."""

  tags = {"generation"}  # noqa: RUF012

  def parse(self, parser: Any) -> list[Any]:
    """The statements inside of the block."""
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(text: str) -> Callable[..., str]:
  """A function of variables, set up as that of `transformers`."""
  environment: Any = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=["jinja2.ext.loopcontrols", Generation],
  )

  def refuse(message: str) -> NoReturn:
    raise Refusal(message)

  environment.globals["raise_exception"] = refuse
  environment.filters["tojson"] = lambda value, indent=None: json.dumps(
    value, ensure_ascii=False, indent=indent
  )
  return environment.from_string(text).render


def limit() -> None:
  """Limits memory and files, where the system can."""
  try:
    import resource
  except ImportError:  # not a Unix
    return
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def main() -> None:
  """Answers lines until there are no more."""
  limit()
  render = None
  for line in sys.stdin:
    given = json.loads(line)
    # A template may raise whatever Python can.
    try:
      if render is None:
        render, text = compile_template(given), ""
      else:
        text = render(**given)
      answer = {"text": text}
    except Exception as error:
      answer = {"error": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  main()
