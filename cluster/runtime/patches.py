"""Run Ray and MLflow with four patches, for changes that neither has a setting for.

`python -m cluster.runtime.patches ray …` and `… mlflow …` otherwise work like `ray` and `mlflow`. Each patch replaces
one private function of a pinned version. If a new version has moved it, the start fails here.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

SETUP_HOOK = "cluster.runtime.patches.keep_replicas_on_loopback"
"""Ray calls this function first in every worker process, if __RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR names it."""
MLFLOW_APPLICATION = "mlflow.server.fastapi_app:app"
GUARDED_APPLICATION = "cluster.runtime.mlflow_guard:create_app"


def keep_replicas_on_loopback() -> None:
    """Make Serve's replicas listen on loopback. By default they accept calls, and so code, on every interface."""
    from ray._common import tls_utils

    add_port = tls_utils.add_port_to_grpc_server

    def add_loopback_port(server: Any, address: str) -> int:
        return add_port(server, address.replace("[::]:", "127.0.0.1:"))

    tls_utils.add_port_to_grpc_server = add_loopback_port


def run_ray() -> None:
    """Run `ray` without the server of Ray Client, which Forgearr does not use. This saves 90 MB."""
    from ray._private import utils

    _patch(utils, "get_ray_client_dependency_error", lambda: ImportError("Forgearr does not use Ray Client"))
    from ray.scripts.scripts import main

    main()


def run_mlflow() -> None:
    """Run MLflow's server behind our guard, in this process and not in a child of one that only waits.

    This saves 190 MB.
    """
    from mlflow import cli, server

    _patch(server, "_exec_cmd", _exec_server)
    cli.cli()


def _exec_server(command: Sequence[object], *, extra_env: Mapping[str, str], **_: object) -> NoReturn:
    *arguments, application = [str(part) for part in command]
    if application != MLFLOW_APPLICATION:
        raise AttributeError(f"mlflow runs {application}: cluster/runtime/patches.py does not fit this version")
    arguments += ["--factory", GUARDED_APPLICATION]
    os.execvpe(arguments[0], arguments, {**os.environ, **extra_env})  # noqa: S606


def _patch(module: Any, name: str, function: Any) -> None:
    if not hasattr(module, name):
        raise AttributeError(f"{module.__name__}.{name} is gone: cluster/runtime/patches.py does not fit this version")
    setattr(module, name, function)


if __name__ == "__main__":
    program = sys.argv.pop(1)
    sys.argv[0] = program
    {"ray": run_ray, "mlflow": run_mlflow}[program]()
