"""Errors of the Hugging Face hub as sentences for the user."""

import contextlib
import os
from collections.abc import Iterator

from huggingface_hub import errors

from train.common.errors import UserError, first_line

GATED = "is gated: accept its terms on its page, then `hf auth login`"


@contextlib.contextmanager
def fetching(name: str, missing: str = "is not on the hub") -> Iterator[None]:
  """Turns the errors of a download into one sentence each.

  Args:
    name: what is fetched, as messages call it.
    missing: what the message says where the repository or file is not found.

  Raises:
    UserError: it does not exist, is gated, or the hub cannot be reached.
  """
  try:
    yield
  except errors.LocalEntryNotFoundError as error:
    raise UserError(unreachable(name, error)) from error
  except errors.GatedRepoError as error:
    raise UserError(f"{name} {GATED}") from error
  except (errors.HfHubHTTPError, errors.HFValidationError) as error:
    raise UserError(f"{name} {missing}: {first_line(error)}") from error


def unreachable(name: str, error: Exception) -> str:
  """The message where the hub does not answer."""
  offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
  hint = "HF_HUB_OFFLINE is set" if offline else "check the network"
  return (
    f"{name}: the hub cannot be reached ({first_line(error)}); {hint}, or use"
    " local files"
  )
