"""The supervisor: the process of `forgearr up`, which starts, watches and stops everything else.

It holds the installation's lock. It starts a Ray head and an MLflow server as children (or uses those that the
settings name), and runs cluster/runtime/bootstrap.py to start the actors and the gateway on Ray. It restarts MLflow.
When Ray dies it stops everything: all state is durable, so the next `forgearr up` continues.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from cluster import logs
from cluster.errors import ForgearrError, SettingsError
from cluster.runtime import embedded, privacy, probes, processes, run_state
from cluster.runtime.run_state import RunState
from cluster.secrets import check_keys
from cluster.settings import Settings, get_settings, mask_url

log = logging.getLogger(__name__)

HEALTH_TIMEOUT_SECONDS = 180
STOP_TIMEOUT_SECONDS = 10
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ROTATE_EVERY_SECONDS = 30
MLFLOW_BACKOFF_SECONDS = (1, 60)
CLUSTER_CHECK_SECONDS = 10
MAX_CLUSTER_FAILURES = 3

Environment = Mapping[str, str]
OnStep = Callable[[str, str], None]
"""Called after each step, with its name and its result."""


class StartFailed(ForgearrError):
    """Forgearr could not be started."""

    code = "START_FAILED"


class StopIncomplete(ForgearrError):
    """Forgearr was stopped, but not completely."""

    code = "STOP_INCOMPLETE"


class RayDied(ForgearrError):
    """Ray has died, so everything was stopped. Nothing is lost: `forgearr up` continues where it stopped."""

    code = "RAY_DIED"


async def run(on_step: OnStep) -> None:
    """Start everything, and watch it until a stop signal. Raises the error that ended the start or the run."""
    settings = get_settings()
    _require_auth_if_public(settings)
    check_keys()
    privacy.require_private_home()
    with run_state.exclusive_lock():
        logs.configure("supervisor")
        if ended := processes.end_leftovers():
            on_step("recovered", f"ended {ended} processes that an earlier run left behind")
        _require_free_ports(settings)
        try:
            await _run_until_signal(settings, on_step)
        finally:
            run_state.clear_run()


async def stop(on_step: OnStep) -> None:
    """Stop a running supervisor, or what a killed one left behind, and verify that nothing is left."""
    run = run_state.last_run()
    if run and (supervisor := run.supervisor):
        supervisor.terminate()
        if not await _wait_until_gone(supervisor):
            on_step("supervisor", f"process {run.pid} does not end; killing it")
            supervisor.kill()
            await _wait_until_gone(supervisor)
    elif run and get_settings().ray.address:
        await _run_bootstrap("down", processes.marked_environment(), on_step)
    with run_state.exclusive_lock():
        if ended := processes.end_leftovers():
            on_step("recovered", f"ended {ended} processes that were left behind")
        open_ports = [port for port in (run.ports if run else []) if processes.is_listening("127.0.0.1", port)]
        run_state.clear_run()
    if open_ports:
        raise StopIncomplete(f"Something still listens on port {', '.join(map(str, open_ports))}.")


def listen_addresses(settings: Settings) -> dict[str, tuple[str, int]]:
    """Return the addresses on which this installation will listen, by the setting of each port."""
    addresses: dict[str, tuple[str, int]] = {}
    if settings.ray.address is None:
        addresses["serve.port"] = (settings.serve.host, settings.serve.port)
        addresses["ray.port"] = ("127.0.0.1", settings.ray.port)
        addresses["ray.dashboard_port"] = ("127.0.0.1", settings.ray.dashboard_port)
    if settings.has_own_mlflow:
        addresses["mlflow.port"] = ("127.0.0.1", settings.mlflow.port)
    return addresses


async def _wait_until_gone(supervisor: psutil.Process) -> bool:
    gone, _ = await asyncio.to_thread(psutil.wait_procs, [supervisor], 4 * STOP_TIMEOUT_SECONDS)
    return bool(gone)


async def _run_until_signal(settings: Settings, on_step: OnStep) -> None:
    task = asyncio.create_task(_start_and_watch(settings, on_step))

    def request_stop() -> None:
        # A second Ctrl-C is ignored: stopping is quick and must not be interrupted.
        if not task.cancelling():
            task.cancel()

    for number in SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, request_stop)
    try:
        await task
    except asyncio.CancelledError:
        log.info("stopped by a signal")
    finally:
        await _clean_up(settings, on_step)
        log.info("stopped")
        on_step("stopped", "")


async def _start_and_watch(settings: Settings, on_step: OnStep) -> None:
    run = _new_run(settings)
    run_state.save_run(run)
    log.info("starting version %s", run.version)
    if os.getuid() == 0:
        log.warning("this is root: an account of its own is safer")
        on_step("warning", "this is root, so a fault in Forgearr is one of the machine: use an account of its own")
    environment = embedded.environment(settings)
    servers = [asyncio.create_task(server) for server in _server_coroutines(settings, environment)]
    startup = asyncio.create_task(_bootstrap(settings, environment, on_step))
    try:
        await _wait_for_first([startup, *servers])
        run_state.save_run(run.model_copy(update={"ready": True}))
        log.info("ready at %s", run.url)
        on_step("ready", run.url)
        await _wait_for_first(servers)
    except RayDied as error:
        raise error if startup.done() else _ray_start_error() from None
    finally:
        for task in (startup, *servers):
            task.cancel()
        await asyncio.gather(startup, *servers, return_exceptions=True)


def _ray_start_error() -> StartFailed:
    path = _log_path("ray")
    last_line = path.read_text(errors="replace").strip().rpartition("\n")[2]
    return StartFailed(f"Ray could not start: {logs.redact(last_line)} (see {path})")


async def _wait_for_first(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait until one of the tasks ends, and raise its error, if any."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


def _server_coroutines(settings: Settings, environment: Environment) -> list[Coroutine[Any, Any, None]]:
    """Return the endless coroutines of the supervisor. One that starts a server stops it when it is cancelled."""
    servers: list[Coroutine[Any, Any, None]] = [_rotate_logs_forever()]
    servers.append(_watch_cluster(settings.ray.address) if settings.ray.address else _run_ray(settings, environment))
    if settings.has_own_mlflow:
        servers.append(_keep_mlflow_running(settings))
    return servers


async def _run_ray(settings: Settings, environment: Environment) -> None:
    ray = await processes.start(embedded.ray_command(settings), environment, _log_path("ray"))
    try:
        code = await ray.wait()
        log.error("ray ended with exit code %s", code)
        raise RayDied
    finally:
        await processes.stop(ray, STOP_TIMEOUT_SECONDS)


async def _watch_cluster(address: str) -> None:
    """Check a cluster that others run. Raises RayDied after MAX_CLUSTER_FAILURES failed checks in a row."""
    failures = 0
    while failures < MAX_CLUSTER_FAILURES:
        await asyncio.sleep(CLUSTER_CHECK_SECONDS)
        failures = 0 if await asyncio.to_thread(processes.is_reachable, address) else failures + 1
    raise RayDied(f"The Ray cluster at {address} is gone. Nothing is lost: run `forgearr up` when it is back.")


async def _keep_mlflow_running(settings: Settings) -> None:
    """Restart MLflow whenever it ends. Jobs do not wait for it, and it receives later what it missed."""
    min_backoff, max_backoff = MLFLOW_BACKOFF_SECONDS
    backoff = min_backoff
    while True:
        started = time.monotonic()
        command, environment = embedded.mlflow_command(settings), embedded.mlflow_environment()
        mlflow = await processes.start(command, environment, _log_path("mlflow"))
        try:
            code = await mlflow.wait()
        finally:
            await processes.stop(mlflow, STOP_TIMEOUT_SECONDS)
        backoff = min_backoff if time.monotonic() - started > max_backoff else min(backoff * 2, max_backoff)
        log.warning("mlflow ended with exit code %s; starting it again in %s s", code, backoff)
        await asyncio.sleep(backoff)


async def _rotate_logs_forever() -> None:
    while True:
        await asyncio.sleep(ROTATE_EVERY_SECONDS)
        logs.rotate()


async def _bootstrap(settings: Settings, environment: Environment, on_step: OnStep) -> None:
    await _run_bootstrap("up", environment, on_step)
    deadline = time.monotonic() + HEALTH_TIMEOUT_SECONDS
    while (gateway_health := await asyncio.to_thread(probes.gateway_health, settings.url)) is None:
        if time.monotonic() > deadline:
            raise StartFailed(f"The gateway at {settings.url} does not answer; see `forgearr logs`.")
        await asyncio.sleep(0.1)
    on_step("health", str(gateway_health["status"]))


async def _run_bootstrap(direction: str, environment: Environment, on_step: OnStep) -> None:
    command = [sys.executable, "-m", "cluster.runtime.bootstrap", direction]
    bootstrap = await processes.start(command, environment, _log_path("bringup"), stdout=asyncio.subprocess.PIPE)
    assert bootstrap.stdout is not None
    try:
        async for line in bootstrap.stdout:
            report = json.loads(line)
            if "error" in report:
                raise StartFailed(report["error"])
            on_step(report["step"], report["detail"])
        if code := await bootstrap.wait():
            raise StartFailed(f"Bringing Forgearr {direction} failed (exit code {code}): see {_log_path('bringup')}.")
    finally:
        await processes.stop(bootstrap, 1)  # it has nothing to clean up


async def _clean_up(settings: Settings, on_step: OnStep) -> None:
    """Stop what is left on a cluster of others, and the processes that Ray and MLflow started.

    Ray and MLflow themselves were stopped when their coroutines were cancelled.
    """
    if settings.ray.address and processes.is_reachable(settings.ray.address):
        await _run_bootstrap("down", processes.marked_environment(), on_step)
    await asyncio.to_thread(processes.end_leftovers)


def _require_auth_if_public(settings: Settings) -> None:
    if settings.is_local or settings.auth_required:
        return
    if settings.ray.address is None:
        reason, remedy = f"serve.host is {settings.serve.host}", "Change one of the two settings."
    else:
        reason = f"Serve listens where the operator of the Ray cluster at {settings.ray.address} has chosen"
        remedy = "Leave auth.required null, and add an administrator: `forgearr user add EMAIL --admin`."
    raise SettingsError(
        f"auth.required is off and {reason}: anyone who reaches the gateway would be its administrator. {remedy}"
    )


def _require_free_ports(settings: Settings) -> None:
    for setting, (host, port) in listen_addresses(settings).items():
        processes.require_free_port(host, port, setting)


def _new_run(settings: Settings) -> RunState:
    started_at = datetime.now(UTC)
    return RunState(
        pid=os.getpid(),
        create_time=psutil.Process().create_time(),
        version=version("forgearr"),
        url=settings.url,
        started_at=started_at,
        ports=[port for _, port in listen_addresses(settings).values()],
        ray_address=settings.ray.address or f"127.0.0.1:{settings.ray.port}",
        dashboard_url=None if settings.ray.address else f"http://127.0.0.1:{settings.ray.dashboard_port}",
        mlflow_uri=settings.mlflow_uri and mask_url(settings.mlflow_uri),
        has_own_mlflow=settings.has_own_mlflow,
    )


def _log_path(name: str) -> Path:
    return logs.folder() / f"{name}.log"
