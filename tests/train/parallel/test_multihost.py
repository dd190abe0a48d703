import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.train.run.small_run import SETTINGS
from train import pretrain
from train.common.errors import UserError
from train.config import schema
from train.parallel import mesh, multihost
from train.run import metrics

ROOT = pathlib.Path(__file__).parents[3]


def free_port():
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


def start(index, address, out, flags):
  """Starts one of two processes, with two devices each."""
  joined = {
    "mesh.coordinator": address, "mesh.processes": 2, "mesh.process": index
  }  # fmt: skip
  extra = [x for k, v in joined.items() for x in ("--set", f"{k}={v}")]
  return launch(["-m", "train.pretrain", "--out", str(out), *flags, *extra], {})


def launch(arguments, variables):
  """Starts Python on two devices, with some more environment variables."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=2",
  }
  return subprocess.Popen(
    [sys.executable, *arguments],
    cwd=ROOT, env=environment | variables, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


def losses(out):
  records = metrics.read(out / metrics.FILE)
  return [r["loss"] for r in records if "loss" in r], [
    r["held_out_loss"] for r in records if "held_out_loss" in r
  ]


@pytest.mark.slow
def test_two_processes_train_to_the_losses_of_one(
  text_file, tmp_path, monkeypatch, capsys
):
  settings = SETTINGS | {
    "data.path": text_file,
    "data.cache": tmp_path / "cache",
    "train.steps": 8,
    "mesh.data": 0,
    "train.accumulate": 2,
  }
  flags = [x for k, v in settings.items() for x in ("--set", f"{k}={v}")]
  two, one = tmp_path / "two", tmp_path / "one"
  address = f"127.0.0.1:{free_port()}"
  mixed = [*flags, "--set", "mesh.fsdp=2"]
  running = [start(index, address, two, mixed) for index in (0, 1)]
  (output, error), (silent, other) = [
    p.communicate(timeout=300) for p in running
  ]
  assert [p.returncode for p in running] == [0, 0], error + other
  assert "devices    4 cpu: 2 data x 2 fsdp x 1 tensor" in output
  # Gloo writes beside Python, at times into the middle of its own lines.
  lines = [x for x in silent.splitlines() if "peer ranks" not in x]
  assert not [x for x in lines if not x.startswith("[Gloo]")]
  monkeypatch.setattr(jax, "devices", lambda found=jax.devices: found()[:1])
  assert pretrain.main(["--out", str(one), *flags]) == 0
  for found, expected in zip(losses(two), losses(one), strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert len(losses(two)[0]) == 8
  assert (two / "checkpoints" / "8" / "state" / "ocdbt.process_1").exists()
  # What two processes have saved, one restores.
  capsys.readouterr()
  assert pretrain.main(["--out", str(two), *flags]) == 0
  assert "the run is complete: all 8 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_with_different_settings_are_refused(text_file, tmp_path):
  settings = SETTINGS | {"data.path": text_file, "mesh.data": 0}
  flags = [x for k, v in settings.items() for x in ("--set", f"{k}={v}")]
  address = f"127.0.0.1:{free_port()}"
  rates = ("0.01", "0.02")
  running = [
    start(
      index,
      address,
      tmp_path / "run",
      [*flags, "--set", f"optimizer.learning_rate={rate}"],
    )
    for index, rate in enumerate(rates)
  ]
  (_, error), _ = [p.communicate(timeout=300) for p in running]
  assert [p.returncode for p in running] == [2, 2]
  assert "optimizer.learning_rate is '0.01' in process 0 and '0.02'" in error
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_settings_that_differ_are_named(monkeypatch):
  fields = {"a.b": 1, "mesh.process": 0, "data.cache": "/x"}
  multihost.check_alike(fields)  # of one process
  other = {"a.b": "2"}
  monkeypatch.setattr(multihost, "gather", lambda own: [own, own, other])
  with pytest.raises(
    UserError, match=r"a\.b is '1' in process 0 and '2' in .* 2"
  ):
    multihost.check_alike(fields)


def test_launchers_that_start_several_processes_are_known():
  assert not multihost.several({})
  assert not multihost.several(
    {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}
  )
  assert multihost.several({"SLURM_STEP_NUM_TASKS": "4"})
  assert multihost.several({"OMPI_COMM_WORLD_SIZE": "2"})
  assert not multihost.several({"TPU_WORKER_HOSTNAMES": "localhost"})
  assert multihost.several({"TPU_WORKER_HOSTNAMES": "a,b"})
  assert multihost.several({"JAX_COORDINATOR_ADDRESS": "a:1"})


def test_one_process_is_first_and_alone(capsys):
  assert multihost.is_first()
  assert multihost.gather({"text": "ü"}) == [{"text": "ü"}]
  with multihost.only_first_prints():
    print("heard")
  assert capsys.readouterr().out == "heard\n"

  def refuse():
    raise UserError("no such thing")

  with pytest.raises(UserError, match="no such thing"):
    multihost.run_on_first(refuse)
  assert multihost.run_on_first_then_others(lambda: 3) == 3


@pytest.mark.parametrize("error", [KeyError("a"), OSError(28, "full")])
def test_what_fails_in_one_process_ends_all(monkeypatch, error):
  """As itself where it failed, with its text in the others."""

  def fail():
    raise error

  messages = []
  with monkeypatch.context() as patch:
    patch.setattr(
      multihost, "gather", lambda text: messages.append(text) or [text]
    )
    for run in (multihost.run_on_first, multihost.run_on_first_then_others):
      with pytest.raises(type(error)) as raised:
        run(fail)
      assert raised.value is error
  assert messages == [str(error)] * 2
  monkeypatch.setattr(multihost, "gather", lambda text: [messages[0], text])
  monkeypatch.setattr(multihost, "is_first", lambda: False)
  for run in (multihost.run_on_first, multihost.run_on_first_then_others):
    with pytest.raises(UserError) as raised:
      run(lambda: 3)
    assert str(raised.value) == str(error)


def test_devices_of_other_processes_are_not_left_alone(monkeypatch):
  monkeypatch.setattr(multihost.jax, "process_count", lambda: 4)
  monkeypatch.setattr(multihost, "several", lambda environment: False)
  with pytest.raises(
    UserError, match=r"belong to 4 processes.*coordinator=auto"
  ):
    multihost.connect(schema.MeshConfig())


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"coordinator": "here"}, "give host:port"),
    ({"processes": 2, "process": 2}, "one of 0 to 1"),
  ],
)
def test_what_cannot_be_joined_is_refused(fields, message):
  with pytest.raises(UserError, match=message):
    schema.MeshConfig(**fields)


class Device:
  """Where a device is, for meshes of processes that do not run here."""

  def __init__(self, process):
    self.process_index = process


class Grid:
  """The part of a mesh that says which device is where."""

  def __init__(self, shape, per_process):
    count = int(np.prod(shape))
    devices = [Device(i // per_process) for i in range(count)]
    self.devices = np.array(devices, object).reshape(shape)
    self.shape = dict(zip(mesh.AXES, shape, strict=True))
    self.size = count


@pytest.mark.parametrize(
  "shape, per_process, parts",
  [
    ((4, 1, 1), 1, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    ((2, 2, 2), 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
    # The tensor axis runs across two processes, which read the same rows.
    ((2, 1, 4), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ((1, 1, 4), 2, [(0, 1), (0, 1)]),
  ],
)
def test_each_process_feeds_the_rows_of_its_devices(
  shape, per_process, parts, monkeypatch
):
  found = []
  for index in range(len(parts)):
    monkeypatch.setattr(jax, "process_index", lambda index=index: index)
    found.append(mesh.batch_part(Grid(shape, per_process)))
  assert found == parts


def test_a_tensor_axis_that_cuts_through_processes_is_refused():
  with pytest.raises(UserError, match=r"mesh.tensor=3 does not fit"):
    mesh.batch_part(Grid((4, 1, 3), 4))
