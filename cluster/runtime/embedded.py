"""Commands and environments of the Ray head and the MLflow server that `forgearr up` starts on this machine.

They run if the settings name no others. All of them listen on loopback only. What could collide with another
installation on this machine (sockets, HAProxy's files, internal ports) is separate for each installation.
"""

import hashlib
import os
import platform
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

from cluster import secrets
from cluster.errors import ForgearrError
from cluster.runtime import haproxy, patches, processes
from cluster.settings import Settings, home

FIRST_PORT, BLOCK_COUNT, PORTS_PER_BLOCK = 20_000, 50, 200
"""Internal ports: a block for each installation."""
SERVICE_PORTS = 4  # of each block; the rest is for gateway replicas


class UnsafeFolder(ForgearrError):
    """A folder for temporary files is not safe to use."""

    code = "UNSAFE_FOLDER"


def environment(settings: Settings) -> dict[str, str]:
    """Return the environment of all processes on Ray, and of those that connect to it."""
    variables = processes.marked_environment()
    variables.pop("RAY_ADDRESS", None)
    if settings.ray.address is not None:
        return variables
    variables.pop("RAY_AUTH_TOKEN", None)  # it would win over the file with our token
    # Without this, Ray reads 127.0.0.1 as "the address of this machine" and listens on every interface.
    variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    variables["__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"] = patches.SETUP_HOOK
    variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    # With Ray's default of 15, every other program has priority over answers. Jobs lower their own priority.
    variables.setdefault("RAY_worker_niceness", "0")
    variables.setdefault("RAY_ROTATION_MAX_BYTES", str(settings.logs.rotate_mb * 1_000_000))
    variables.setdefault("RAY_ROTATION_BACKUP_COUNT", "1")
    return variables | ray_credentials() | _serve_environment(settings)


def ray_credentials() -> dict[str, str]:
    """Return the variables with which a program may use our Ray. The file is readable by this account only."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(secrets.ray_token_path())}


def ray_command(settings: Settings) -> list[str]:
    folder = private_folder(home()) / "ray"
    _delete_old_sessions(folder)
    options: dict[str, Any] = {
        "--node-ip-address": "127.0.0.1",
        "--port": settings.ray.port,
        "--dashboard-host": "127.0.0.1",
        "--dashboard-port": settings.ray.dashboard_port,
        "--dashboard-agent-listen-port": 0,
        # 0: any free port. Ray's default range would reserve 10002 to 19999.
        "--min-worker-port": 0,
        "--max-worker-port": 0,
        "--temp-dir": folder,
        "--object-store-memory": settings.ray.object_store_mb * 1_000_000,
        "--include-log-monitor": "false",
        # The node's id changes with each start. Jobs that need this machine select it by this label.
        "--labels": f"forgearr.io/node={platform.node()}",
    }
    if settings.ray.cpus is not None:
        options["--num-cpus"] = settings.ray.cpus
    if settings.ray.gpus is not None:
        options["--num-gpus"] = settings.ray.gpus
    command = [sys.executable, "-m", "cluster.runtime.patches", "ray", "start", "--head", "--block"]
    command += ["--no-monitor", "--disable-usage-stats"]
    return command + [f"{name}={value}" for name, value in options.items()]


def private_folder(home: Path) -> Path:
    """Return the folder for sockets. Their paths are limited to 107 characters, so FORGEARR_HOME may be too long.

    Ray makes its own folder accessible to everybody, so that one is a subfolder of this one.
    """
    digest = hashlib.sha256(str(home).encode()).hexdigest()[:8]
    folder = Path("/tmp") / f"forgearr-{os.getuid()}-{digest}"  # noqa: S108
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UnsafeFolder(f"{folder} belongs to another account, or others may write to it: remove it and try again.")
    return folder


def mlflow_command(settings: Settings) -> list[str]:
    folder = home() / "mlflow"
    folder.mkdir(mode=0o700, exist_ok=True)
    options = {
        "--backend-store-uri": f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination": folder / "artifacts",
        "--host": "127.0.0.1",
        "--port": settings.mlflow.port,
        "--workers": 1,
        "--uvicorn-opts": "--log-level warning",
    }
    command = [sys.executable, "-m", "cluster.runtime.patches", "mlflow", "server", "--serve-artifacts"]
    return command + [f"{name}={value}" for name, value in options.items()]


def mlflow_environment() -> dict[str, str]:
    return processes.marked_environment() | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves 275 MB; Forgearr has its own queue
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def _delete_old_sessions(folder: Path) -> None:
    """Delete the logs of all sessions of Ray but the last one."""
    sessions = sorted(path for path in folder.glob("session_2*") if path.is_dir() and not path.is_symlink())
    for session in sessions[:-1]:
        shutil.rmtree(session)


def _serve_environment(settings: Settings) -> dict[str, str]:
    """Configure Serve to run behind HAProxy, where that exists (Linux). Elsewhere Serve's own proxy is used."""
    binary = haproxy.bundled_binary()
    proxies = settings.serve.trusted_proxies
    if binary is None:
        return {"FORWARDED_ALLOW_IPS": ",".join(proxies)}
    folder = private_folder(home())
    first = _find_port_block(settings)
    stats, metrics, fallback, fallback_grpc, first_replica = range(first, first + SERVICE_PORTS + 1)
    return {
        # uvicorn accepts X-Forwarded-For from HAProxy, which itself accepts it from these proxies only.
        "FORWARDED_ALLOW_IPS": ",".join(["127.0.0.1", *proxies]),
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # On a busy machine a proxy may need more than the default 5 s to start, and would be killed.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        # The gateway passes whole request bodies to an engine. The default limit is 4 MiB.
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(64 * 1024 * 1024),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(haproxy.write_launcher(folder, binary, settings.serve.host, proxies)),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        # These cost a log line per request, which a Python process parses. The gateway's /metrics has the same numbers.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "haproxy.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "haproxy-metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "haproxy-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_replica),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + PORTS_PER_BLOCK - 1),
    }


def _configured_ports(settings: Settings) -> set[int]:
    return {settings.serve.port, settings.ray.port, settings.ray.dashboard_port, settings.mlflow.port}


def _find_port_block(settings: Settings) -> int:
    """Return the first port of a free block. Each installation begins its search at another block.

    The blocks are below the range from which the system assigns ports: HAProxy binds its ports seconds after they are
    chosen, and a port of that range may be taken by then.
    """
    digest = int.from_bytes(hashlib.sha256(str(home()).encode()).digest()[:2])
    blocks = [FIRST_PORT + (digest + offset) % BLOCK_COUNT * PORTS_PER_BLOCK for offset in range(BLOCK_COUNT)]
    configured = _configured_ports(settings)
    for first in blocks:
        ports = range(first, first + SERVICE_PORTS)
        if configured.isdisjoint(ports) and not any(processes.is_listening("127.0.0.1", port) for port in ports):
            return first
    raise processes.PortUnavailable(
        f"No block of ports is free from {FIRST_PORT} to {FIRST_PORT + BLOCK_COUNT * PORTS_PER_BLOCK}."
    )
