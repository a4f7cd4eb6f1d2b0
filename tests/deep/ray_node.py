"""A second node of a cluster on this machine: `python -m tests.deep.ray_node ADDRESS LABEL VALUE` runs until killed.

Ray's own command refuses to join a cluster on loopback.
"""

import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil


def start_node(address: str, environment: Mapping[str, str], log_file: Path) -> subprocess.Popen[bytes]:
    """Start a second node of the cluster. Only this node has the label role=trainer."""
    command = [sys.executable, "-m", "tests.deep.ray_node", address, "role", "trainer"]
    with log_file.open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """Kill the node's raylet and all processes that run on it."""
    processes = psutil.Process(node.pid).children(recursive=True)
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=10)
    node.kill()
    node.wait()


def main(address: str, label: str, value: str) -> None:
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    parameters = RayParams(
        gcs_address=address,
        node_ip_address="127.0.0.1",
        num_cpus=1,
        labels={label: value},
        object_store_memory=80_000_000,
        node_manager_port=0,
        min_worker_port=0,
        max_worker_port=0,
    )
    Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
    signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
