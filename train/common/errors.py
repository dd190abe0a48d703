"""The errors that the scripts report in one sentence, without a traceback."""


class UserError(Exception):
  """Something the user can put right: a flag, a path, a file, a mesh.

  Its text names the field or path, says what was found and what would work.
  The command prints it and exits with status 2.
  """


class TrainingError(Exception):
  """Training cannot go on; exit status 1."""


class Diverged(TrainingError):
  """Its gradients, or the loss that it ends with, are not finite."""


LONGEST = 300  # characters of another library's message


def first_line(error: BaseException) -> str:
  """The first line of an error's text, or its type if it has no text."""
  line = (str(error).strip() or type(error).__name__).splitlines()[0]
  return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."
