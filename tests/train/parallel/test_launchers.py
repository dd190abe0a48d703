"""Launchers: the variables they set, and the files in `train/launch`.

None of them is run here. Processes get the variables that a launcher would set.
"""

import os
import pathlib
import re
import signal
import subprocess
import time

import jax
import pytest

from tests.train.parallel import test_multihost
from tests.train.run.small_run import SETTINGS
from train.common.errors import UserError
from train.config import cli, presets, schema
from train.parallel import multihost

FOLDER = test_multihost.ROOT / "train" / "launch"
DOCS = test_multihost.ROOT / "docs"
PAGES = (DOCS / "how-to" / "launching.md", DOCS / "explanation" / "meshes.md")
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


def slurm(index, port):
  return {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": str(index),
    "SLURM_LOCALID": str(index),
    "JAX_COORDINATOR_PORT": str(port),
  }


def open_mpi(index, port):
  """What mpirun sets from version 5 on, and -x exports."""
  return {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": str(index),
    "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
  }


def open_mpi_4(index, port):
  found = open_mpi(index, port) | {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
    "JAX_COORDINATOR_PORT": str(port),
  }
  del found["JAX_COORDINATOR_ADDRESS"]
  return found


def jobset(index, port):
  """What jobset_gpu.yaml and Kubeflow's trainer set."""
  return KUBERNETES | {
    "JOB_COMPLETION_INDEX": str(index),
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": str(index),
  }


def ray(index, port):
  """What ray_job.py sets."""
  return {
    name: value
    for name, value in jobset(index, port).items()
    if name.startswith("JAX_")
  }


def gke(index, port):
  """What GKE sets in pods with TPUs."""
  return KUBERNETES | {
    "TPU_WORKER_HOSTNAMES": "localhost,localhost",
    "TPU_WORKER_ID": str(index),
    "JAX_COORDINATOR_PORT": str(port),
  }


LAUNCHERS = (slurm, open_mpi, open_mpi_4, jobset, ray, gke)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_variables_of_each_launcher_say_that_there_are_several(launcher):
  assert multihost.several(launcher(1, 1234))


def test_one_pod_alone_is_not_several():
  assert not multihost.several(KUBERNETES | {"JOB_COMPLETION_INDEX": "0"})
  assert not multihost.several({"MEGASCALE_NUM_SLICES": "1"})
  assert multihost.several({"MEGASCALE_NUM_SLICES": "2"})


@pytest.mark.parametrize(
  "variables, expected",
  [
    (ray(1, 9), {"num_processes": 2, "process_id": 1}),
    (
      jobset(0, 9),
      {
        "num_processes": 2,
        "process_id": 0,
        "cluster_detection_method": "deactivate",
      },
    ),
    (
      open_mpi(1, 9),
      {"num_processes": 2, "process_id": 1, "local_device_ids": [1]},
    ),
    (
      open_mpi(1, 9) | {"JAX_LOCAL_DEVICE_IDS": "0,1"},
      {"num_processes": 2, "process_id": 1},
    ),
    # JAX finds these itself.
    (slurm(1, 9), {}),
    (open_mpi_4(1, 9), {}),
    (gke(1, 9), {}),
    ({"JAX_COORDINATOR_ADDRESS": "a:1"}, {}),
  ],
)
def test_what_jax_does_not_find_is_read_from_the_environment(
  variables, expected
):
  assert multihost.place(variables) == expected


@pytest.mark.parametrize(
  "change, message",
  [
    ({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is ''"),
    ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'"),
  ],
)
def test_a_variable_that_is_missing_is_named(change, message):
  with pytest.raises(UserError, match=message):
    multihost.place(ray(0, 9) | change)


@pytest.mark.parametrize(
  "fields, variables, expected",
  [
    ({}, ray(1, 9), {"num_processes": 2, "process_id": 1}),
    # Settings have the last word.
    (
      {"coordinator": "b:1", "processes": 3, "process": 2},
      ray(1, 9),
      {"coordinator_address": "b:1", "num_processes": 3, "process_id": 2},
    ),
    ({"coordinator": "auto"}, {}, {}),
  ],
)
def test_jax_is_given_what_the_launcher_says(
  fields, variables, expected, monkeypatch
):
  given = {}
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  # Otherwise this process could not use its devices any more.
  monkeypatch.setattr(jax.config, "update", lambda name, value: None)
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda **found: given.update(found)
  )
  multihost.connect(schema.MeshConfig(**fields))
  assert given.pop("heartbeat_timeout_seconds") == 100
  assert given == expected


def flags_are_known(flags):
  """Parses flags of `train.pretrain` and returns the folder of the run."""
  found = cli.parse([str(flag) for flag in flags])
  preset = presets.make(found.preset, found.optimizer)
  schema.override(preset, found.settings)
  return found.out


def fake(folder, name, script):
  """A program of that name that runs before the real one is found."""
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/bin/bash\n{script}\n")
  path.chmod(0o755)


def run_script(path, folder, *arguments, **variables):
  environment = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(folder)}
  return subprocess.run(
    ["bash", path, *arguments],
    env=environment | variables, cwd=folder, text=True, capture_output=True,
  )  # fmt: skip


def eventually(happens):
  for _ in range(600):
    if happens():
      return
    time.sleep(0.1)
  raise AssertionError("it did not happen within a minute")


RECORD = 'printf "%s\\n" "$@" > flags'


@pytest.mark.parametrize(
  "status, requeued", [(0, False), (130, True), (2, False)]
)
def test_the_slurm_script_requeues_a_run_whose_time_is_up(
  status, requeued, tmp_path
):
  fake(tmp_path, "srun", f"{RECORD}; exit {status}")
  fake(tmp_path, "scontrol", 'echo "$@" > requeued')
  done = run_script(FOLDER / "slurm.sh", tmp_path, SLURM_JOB_ID="17")
  assert done.returncode == status, done.stderr
  assert (tmp_path / "requeued").exists() == requeued
  option, python, module, name, *flags = (
    (tmp_path / "flags").read_text().split("\n")[:-1]
  )
  assert (option, module, name) == (
    "--kill-on-bad-exit=1", "-m", "train.pretrain"
  )  # fmt: skip
  assert python == ".venv/bin/python"
  assert flags_are_known(flags) == pathlib.Path("/shared/runs/llama_1b")


def test_the_slurm_script_does_not_requeue_what_was_cancelled(tmp_path):
  """And waits until the run is saved."""
  fake(tmp_path, "srun", "echo > ready; sleep 1; echo > saved; exit 130")
  fake(tmp_path, "scontrol", "echo > requeued")
  running = subprocess.Popen(
    ["bash", FOLDER / "slurm.sh"],
    env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"},
    cwd=tmp_path,
  )
  eventually((tmp_path / "ready").exists)
  running.send_signal(signal.SIGTERM)
  assert running.wait(timeout=60) == 130
  assert (tmp_path / "saved").exists()
  assert not (tmp_path / "requeued").exists()


def test_options_of_sbatch_come_before_the_first_command():
  """After it SLURM ignores them."""
  lines = (FOLDER / "slurm.sh").read_text().splitlines()
  commands = [i for i, x in enumerate(lines) if x and x[0] != "#"]
  options = [i for i, x in enumerate(lines) if x.startswith("#SBATCH")]
  assert options and max(options) < min(commands)


def test_the_script_for_tpu_vms_starts_and_stops_the_run(tmp_path):
  text = (FOLDER / "tpu_pod.sh").read_text()
  assert "CHECKOUT=/shared/galore-optax " in text
  script = tmp_path / "tpu_pod.sh"
  script.write_text(
    text.replace("CHECKOUT=/shared/galore-optax ", f"CHECKOUT={tmp_path} ")
  )
  fake(tmp_path, "gcloud", 'echo "$@" > asked; bash -c "${@: -1}"')
  run = "trap 'echo > stopped; exit 130' TERM; echo running; "
  run += "while true; do sleep .1; done"
  fake(tmp_path / ".venv/bin", "python", f"{RECORD}; {run}")
  assert run_script(script, tmp_path, "start").returncode == 0
  asked = (tmp_path / "asked").read_text()
  assert asked.startswith(
    "compute tpus tpu-vm ssh my-slice --zone us-west4-a --worker=all --command"
  )
  pid = int((tmp_path / "pretrain.pid").read_text())
  try:
    eventually(
      lambda: run_script(script, tmp_path, "log").stdout == "running\n"
    )
    assert run_script(script, tmp_path, "stop").returncode == 0
    eventually((tmp_path / "stopped").exists)
  finally:
    subprocess.run(["kill", "-KILL", str(pid)], stderr=subprocess.DEVNULL)
  module, name, *flags = (tmp_path / "flags").read_text().split("\n")[:-1]
  assert (module, name) == ("-m", "train.pretrain")
  assert "mesh.coordinator=auto" in flags
  assert flags_are_known(flags) == pathlib.Path("/shared/runs/llama_7b")
  assert run_script(script, tmp_path, "begin").returncode == 2


@pytest.mark.parametrize("name", ["jobset_tpu.yaml", "jobset_gpu.yaml"])
def test_the_job_sets_agree_with_themselves(name):
  yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
  spec = yaml.safe_load((FOLDER / name).read_text())
  assert spec["kind"] == "JobSet"
  (workers,) = spec["spec"]["replicatedJobs"]
  job = workers["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  assert job["completions"] == job["parallelism"]
  # Any failure restarts the set, except for wrong settings.
  assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["values"] == [2]
  assert [*container["command"]] == ["python", "-m", "train.pretrain"]
  out = flags_are_known(container["args"])
  assert str(out).startswith(container["volumeMounts"][0]["mountPath"])
  names = {volume["name"] for volume in pod["volumes"]}
  assert names == {mount["name"] for mount in container["volumeMounts"]}
  variables = {x["name"]: x.get("value", "0") for x in container.get("env", [])}
  if name == "jobset_gpu.yaml":
    first = f"{spec['metadata']['name']}-{workers['name']}-0-0"
    address = variables["JAX_COORDINATOR_ADDRESS"]
    assert address.startswith(f"{first}.{spec['metadata']['name']}:")
    port = container["ports"][0]["containerPort"]
    assert address.endswith(f":{port}")
    assert multihost.place(variables | KUBERNETES) == {
      "num_processes": job["parallelism"],
      "process_id": 0,
      "cluster_detection_method": "deactivate",
    }


def test_the_settings_on_the_pages_exist():
  files = [*PAGES, *(path for path in FOLDER.iterdir() if path.is_file())]
  text = "".join(path.read_text() for path in files)
  settings = re.findall(r"--set[ =]([\w.]+=[\w:/.~-]+)", text)
  assert len(settings) > 10
  for setting in settings:
    schema.override(presets.make("llama_7b", "galore"), [setting])


# What a process of GKE sees, without its TPU.
ON_A_TPU = """
from jax._src.clusters import cloud_tpu_cluster
cloud_tpu_cluster.running_in_cloud_tpu_vm = True
from tests.train.run import driver
raise SystemExit(driver.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_processes_join_train_and_end_when_one_is_killed(
  launcher, text_file, tmp_path
):
  settings = SETTINGS | {
    "data.path": text_file,
    "data.cache": tmp_path / "cache",
    "train.steps": 1_000_000,
    "run.checkpoint_every": 2,
    "run.eval_every": 1_000_000,
    "mesh.data": 0,
    "mesh.fsdp": 2,
    "mesh.lost_after": 5,
  }
  flags = [x for k, v in settings.items() for x in ("--set", f"{k}={v}")]
  out, port = tmp_path / "run", test_multihost.free_port()
  program = ["-m", "tests.train.run.driver"]
  if launcher is gke:
    program = ["-c", ON_A_TPU]
  running = [
    test_multihost.launch(
      [*program, "killed-after", last, "--", "--out", str(out), *flags],
      launcher(index, port),
    )
    for index, last in enumerate(("1000000", "5"))
  ]
  try:
    (output, error), _ = [p.communicate(timeout=300) for p in running]
  finally:
    for process in running:
      process.kill()
  assert [p.returncode for p in running] == [1, -signal.SIGKILL], error
  assert "devices    4 cpu: 2 data x 2 fsdp x 1 tensor" in output
  assert "process 1 of 2 gave no sign of life for 5 s" in error
  assert "Step 4 is saved in" in error
  assert len(test_multihost.losses(out)[0]) >= 5
