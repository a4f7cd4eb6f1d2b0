"""Ray and MLflow, with three adjustments for which neither has a setting.

`python -m cluster.runtime.patches ray …` and `… mlflow …` are their own command lines otherwise. Each
adjustment replaces one private function of a pinned version; should a new version have moved it, starting fails here.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

SETUP_HOOK = "cluster.runtime.patches.keep_replicas_on_loopback"
"""What every worker process of Ray runs first, when __RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR names it."""


def keep_replicas_on_loopback() -> None:
    """Serve's replicas listen for each other on every interface, and run what they are sent: that is for loopback."""
    from ray._common import tls_utils

    add_port = tls_utils.add_port_to_grpc_server

    def add_loopback_port(server: Any, address: str) -> int:
        return add_port(server, address.replace("[::]:", "127.0.0.1:"))

    tls_utils.add_port_to_grpc_server = add_loopback_port


def run_ray() -> None:
    """Ray, without the server of Ray Client, which nothing here uses: 90 MB."""
    from ray._private import utils

    _patch(utils, "get_ray_client_dependency_error", lambda: ImportError("Forgearr does not use Ray Client"))
    from ray.scripts.scripts import main

    main()


def run_mlflow() -> None:
    """MLflow's server, in this process instead of beside a parent that only waits for it: 190 MB."""
    from mlflow import cli, server

    _patch(server, "_exec_cmd", _exec_server)
    cli.cli()


def _exec_server(command: Sequence[object], *, extra_env: Mapping[str, str], **_: object) -> NoReturn:
    arguments = [str(part) for part in command]
    os.execvpe(arguments[0], arguments, {**os.environ, **extra_env})  # noqa: S606


def _patch(module: Any, name: str, function: Any) -> None:
    if not hasattr(module, name):
        raise AttributeError(f"{module.__name__}.{name} is gone: cluster/runtime/patches.py does not fit this version")
    setattr(module, name, function)


if __name__ == "__main__":
    program = sys.argv.pop(1)
    sys.argv[0] = program
    {"ray": run_ray, "mlflow": run_mlflow}[program]()
