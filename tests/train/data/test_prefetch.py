import threading
import time

import numpy as np
import pytest

from train.common.errors import UserError
from train.data.prefetch import Loader, Prefetch


def numbered(count, started=None):
  for i in range(count):
    if started is not None:
      started.append(i)
    yield np.full((2, 3), i), {"batches": i + 1}


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_the_state_is_that_of_the_last_returned_batch(ahead):
  started = []
  with Loader(numbered(9, started), {"batches": 0}, ahead) as loader:
    assert loader.state() == {"batches": 0}
    assert next(loader)[0, 0] == 0 and next(loader)[0, 0] == 1
    deadline = time.monotonic() + 10
    while len(started) < 2 + ahead and time.monotonic() < deadline:
      time.sleep(0.01)
    # The thread is ahead; the position is not.
    assert len(started) >= 2 + ahead
    assert loader.state() == {"batches": 2}
    assert [rows[0, 0] for rows in loader] == list(range(2, 9))
    assert loader.state() == {"batches": 9}


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_is_raised_after_the_items_before_it(ahead):
  def failing():
    yield from numbered(2)
    raise UserError("shard 3 cannot be read")

  with Loader(failing(), {}, ahead) as loader:
    assert [next(loader)[0, 0], next(loader)[0, 0]] == [0, 1]
    with pytest.raises(UserError, match="shard 3"):
      next(loader)
    assert loader.state() == {"batches": 2}
    if ahead:  # is raised again; a loader without a thread has ended
      with pytest.raises(UserError, match="shard 3"):
        next(loader)


def test_closing_ends_the_thread_and_the_iterator():
  ended, before = [], threading.active_count()

  def endless():
    try:
      while True:
        yield 1
    finally:
      ended.append(True)

  outer = Prefetch(endless(), 2)
  assert next(outer) == 1
  outer.close()
  assert ended == [True]
  assert threading.active_count() == before
  with pytest.raises(ValueError, match="closed"):
    next(outer)


def test_waiting_time_is_measured():
  def slow():
    for i in range(3):
      time.sleep(0.05)
      yield np.zeros((1, 2)), {"batches": i}

  with Loader(slow(), {}, 1) as loader:
    next(loader)
    assert loader.waited >= 0.04
    time.sleep(0.2)  # the thread prepares the next batch
    before = loader.waited
    next(loader)
    assert loader.waited - before < 0.04
