"""How commands end, and what Ctrl-C does before they have begun."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from train.common import commands
from train.common.errors import Diverged, UserError

ROOT = pathlib.Path(__file__).parents[3]
STARTED = "import sys; sys.argv[:] = ['-m']; import train"
CTRL_C = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT)"


def python(*lines):
  """Runs a program that begins as `python -m train.…` does."""
  return subprocess.run(
    [sys.executable, "-c", "\n".join([STARTED, *lines])],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


def raised(error):
  def action():
    raise error

  return action


@pytest.mark.parametrize(
  "error, status, line",
  [
    (UserError("no such file"), 2, "error: no such file"),
    (Diverged("step 3"), 1, "stopped: step 3"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (KeyboardInterrupt("step 3 is saved"), 130, "step 3 is saved"),
    (
      OSError(errno.ENOSPC, "No space left", "run"),
      1,
      "stopped: run: No space left; make room and run the same command, which"
      " continues from the newest checkpoint",
    ),
  ],
)
def test_an_error_is_a_line_and_a_status(error, status, line, capsys):
  assert commands.run(raised(error)) == status
  assert capsys.readouterr().err == f"{line}\n"


def test_the_status_is_the_actions_own():
  assert commands.run(lambda: 7) == 7
  assert commands.run(lambda: None) == 0
  with pytest.raises(PermissionError):
    commands.run(raised(PermissionError(errno.EACCES, "denied")))


def test_ctrl_c_during_imports_ends_in_a_line():
  """Also where a package would lose the exception."""
  done = python("try:", f"  {CTRL_C}; time.sleep(9)", "finally: print('lost')")
  assert (done.returncode, done.stdout) == (130, "")
  assert done.stderr == "interrupted\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_command_clears_up_after_a_signal(name):
  done = python(
    "from train.common import commands",
    "def action():",
    f"  try: {CTRL_C.replace('SIGINT', name)}; time.sleep(9)",
    "  finally: print('cleared')",
    "sys.exit(commands.run(action))",
  )
  assert (done.returncode, done.stdout) == (130, "cleared\n")
  assert done.stderr == "interrupted\n"


def test_signals_are_left_as_they_were():
  before = signal.getsignal(signal.SIGTERM)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  commands.run(lambda: None)
  assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 1, 2])
def test_ctrl_c_while_a_command_is_imported(seconds):
  started = subprocess.Popen(
    [sys.executable, "-m", "train.pretrain", "--dry-run"],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stderr=subprocess.PIPE,
    text=True,
  )
  time.sleep(seconds)
  started.send_signal(signal.SIGINT)
  _, error = started.communicate(timeout=60)
  assert (started.returncode, error) == (130, "interrupted\n")
