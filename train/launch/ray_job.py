"""Starts a run on the nodes of a Ray cluster, one process on each node.

    ray job submit --working-dir . -- \
      python -m train.launch.ray_job --nodes 2 --gpus 8 -- \
      --preset llama_1b --set mesh.fsdp=16 --out /shared/runs/llama_1b

What follows `--` are the flags of `train.pretrain`. If a process or its node is
lost, all are started again, up to `--restarts` times, and continue from the
newest checkpoint. `ray job stop` lets the run save first. The exit status is
that of the run.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys

import ray
from ray.util import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

# After which nothing is started again: done, wrong settings, asked to stop.
FINAL = (0, 2, 130)


class Host:
  """The process of one node."""

  def __init__(self):
    self._process = None

  def address(self) -> str:
    """An address that is free for process 0."""
    with socket.socket() as found:
      found.bind(("", 0))
      return f"{ray.util.get_node_ip_address()}:{found.getsockname()[1]}"

  def run(self, address: str, count: int, index: int, flags: list[str]) -> int:
    """Runs the process and returns its exit status."""
    joined = {
      "JAX_COORDINATOR_ADDRESS": address,
      "JAX_NUM_PROCESSES": str(count),
      "JAX_PROCESS_ID": str(index),
    }
    self._process = subprocess.Popen(
      [sys.executable, "-m", "train.pretrain", *flags], env=os.environ | joined
    )
    return self._process.wait()

  def stop(self) -> None:
    """Asks the process to save and end."""
    if self._process:
      self._process.terminate()


def attempt(nodes: int, resources: dict[str, float], flags: list[str]) -> int:
  """Starts a process on each node; returns the largest exit status."""
  group = placement_group([resources] * nodes, strategy="SPREAD")
  ray.get(group.ready())
  # So that `stop` is heard while `run` waits.
  host_actor = ray.remote(max_concurrency=2)(Host)
  hosts = [
    host_actor.options(
      num_cpus=resources["CPU"],
      num_gpus=resources.get("GPU", 0),
      scheduling_strategy=PlacementGroupSchedulingStrategy(group, index),
    ).remote()
    for index in range(nodes)
  ]

  def stop(number: int, frame: object) -> None:
    hosts[0].stop.remote()  # which stops all of them after the same step

  signal.signal(signal.SIGTERM, stop)
  signal.signal(signal.SIGINT, stop)
  try:
    address = ray.get(hosts[0].address.remote())
    running = [
      host.run.remote(address, nodes, index, flags)
      for index, host in enumerate(hosts)
    ]
    return max(abs(status) for status in ray.get(running))
  except ray.exceptions.RayActorError as error:
    print(f"a node was lost: {error}", file=sys.stderr)
    return 1
  finally:
    ray.util.remove_placement_group(group)


def main() -> int:
  """Runs the command."""
  parser = argparse.ArgumentParser(
    prog="python -m train.launch.ray_job",
    description="Starts train.pretrain on the nodes of a Ray cluster.",
  )
  add = parser.add_argument
  add("--nodes", type=int, required=True, help="nodes, a process on each")
  add("--cpus", type=float, default=1, help="CPUs of a node; default: 1")
  add("--gpus", type=float, default=0, help="GPUs of a node; default: none")
  add("--restarts", type=int, default=10, help="after losses; default: 10")
  add("flags", nargs="*", help="after `--`: those of train.pretrain")
  options = parser.parse_args()
  resources = {"CPU": options.cpus}
  resources |= {"GPU": options.gpus} if options.gpus else {}
  ray.init()
  status = attempt(options.nodes, resources, options.flags)
  for _ in range(options.restarts):
    if status in FINAL:
      break
    status = attempt(options.nodes, resources, options.flags)
  return status


if __name__ == "__main__":
  sys.exit(main())
