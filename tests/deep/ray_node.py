"""A second node of a cluster on this machine: `python -m tests.deep.ray_node ADDRESS LABEL VALUE` runs until killed.

Ray's own command refuses to join a cluster on loopback.
"""

import signal
import sys

from ray._private.node import Node
from ray._private.parameter import RayParams


def main(address: str, label: str, value: str) -> None:
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
