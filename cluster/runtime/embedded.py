"""The Ray head and the MLflow server that run on this machine when the settings name no others.

All of it listens on loopback only. Whatever could collide with another installation on this machine (sockets, HAProxy's
files, ports that nobody needs to know) is kept apart.
"""

import hashlib
import os
import platform
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

from cluster.errors import ForgearrError
from cluster.runtime import haproxy, patches, processes
from cluster.settings import Settings, home

FIRST_PORT, BLOCK_COUNT, PORTS_PER_BLOCK = 20_000, 50, 200
"""Ports for what nobody needs to know the port of: a block for each installation."""
SERVICE_PORTS = 4  # of each block; the rest is for gateway replicas


class UnsafeFolder(ForgearrError):
    """A folder for temporary files is not safe to use."""

    code = "UNSAFE_FOLDER"


def environment(settings: Settings) -> dict[str, str]:
    """What everything on Ray, and whoever talks to it, finds in its environment."""
    variables = processes.marked_environment()
    variables.pop("RAY_ADDRESS", None)
    if settings.ray.address is not None:
        return variables
    # Without this, Ray takes 127.0.0.1 for "this machine's address" and listens on every interface.
    variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    variables["__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"] = patches.SETUP_HOOK
    variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
    # Ray's 15 would let everything else on this machine go before an answer; jobs stand back by themselves.
    variables.setdefault("RAY_worker_niceness", "0")
    # Everything is on loopback, and `ray job submit` works as it is. Who shares the machine with people that they
    # do not trust sets RAY_AUTH_MODE=token before `forgearr up`, as in Ray's documentation.
    variables.setdefault("RAY_AUTH_MODE", "disabled")
    return variables | _serve_environment(settings)


def ray_command(settings: Settings) -> list[str]:
    folder = private_folder(home()) / "ray"
    _delete_old_sessions(folder)
    options: dict[str, Any] = {
        "--node-ip-address": "127.0.0.1",
        "--port": settings.ray.port,
        "--dashboard-host": "127.0.0.1",
        "--dashboard-port": settings.ray.dashboard_port,
        "--dashboard-agent-listen-port": 0,
        # Any free ports: Ray's own range would forbid 10002 to 19999 to everything else here.
        "--min-worker-port": 0,
        "--max-worker-port": 0,
        "--temp-dir": folder,
        "--object-store-memory": settings.ray.object_store_mb * 1_000_000,
        "--include-log-monitor": "false",
        # Ray gives the node a new id each time; jobs that are meant for this machine must find it again.
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
    """Where sockets live. Their paths have 107 characters at most, so FORGEARR_HOME may lie too deep for them.

    Ray opens its own folder to everybody, which is why that is another one, inside this one.
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
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # 275 MB for what Forgearr's own queue does
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def _delete_old_sessions(folder: Path) -> None:
    """Keep the logs of the last session of Ray only."""
    sessions = sorted(path for path in folder.glob("session_2*") if path.is_dir() and not path.is_symlink())
    for session in sessions[:-1]:
        shutil.rmtree(session)


def _serve_environment(settings: Settings) -> dict[str, str]:
    """Serve behind HAProxy, where that exists (Linux); elsewhere Serve's own proxy answers."""
    binary = haproxy.bundled_binary()
    proxies = settings.serve.trusted_proxies
    if binary is None:
        return {"FORWARDED_ALLOW_IPS": ",".join(proxies)}
    folder = private_folder(home())
    first = _find_port_block(settings)
    stats, metrics, fallback, fallback_grpc, first_replica = range(first, first + SERVICE_PORTS + 1)
    return {
        # Whose X-Forwarded-For uvicorn believes: HAProxy's, which is made from nothing but what these proxies tell it.
        "FORWARDED_ALLOW_IPS": ",".join(["127.0.0.1", *proxies]),
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # On a machine that is busy a proxy takes longer than the usual 5 s to begin, and would be ended for that.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        # What the gateway tells an engine at once: any body that it takes. Without this, 4 MiB.
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(64 * 1024 * 1024),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(haproxy.write_launcher(folder, binary, settings.serve.host, proxies)),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        # A line of metrics per request that a Python process parses; the gateway's own /metrics tells the same.
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
    """The first of a block of ports: below those that the system gives out, and another one for each installation.

    HAProxy binds its ports seconds after they were chosen; one that the system gives out may be taken by then.
    """
    digest = int.from_bytes(hashlib.sha256(str(home()).encode()).digest()[:2])
    blocks = [FIRST_PORT + (digest + offset) % BLOCK_COUNT * PORTS_PER_BLOCK for offset in range(BLOCK_COUNT)]
    configured = _configured_ports(settings)
    for first in blocks:
        ports = range(first, first + SERVICE_PORTS)
        if configured.isdisjoint(ports) and not any(processes.is_listening("127.0.0.1", port) for port in ports):
            return first
    raise processes.PortUnavailable(
        f"Nothing is free from port {FIRST_PORT} to {FIRST_PORT + BLOCK_COUNT * PORTS_PER_BLOCK}."
    )
