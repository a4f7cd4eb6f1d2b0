"""Start Forgearr's actors and gateway on Ray, or stop them: `python -m cluster.runtime.bootstrap up|down`.

It is a short process of its own, so that the supervisor, which runs for long, loads neither Ray nor SQLAlchemy. It
reports in lines of JSON on its standard output: each finished step, or the error.
"""

import asyncio
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cluster import logs, secrets, storage
from cluster.errors import ForgearrError, SettingsError, Unavailable
from cluster.runtime import processes
from cluster.runtime.node_versions import NodeVersions
from cluster.settings import DEFAULTS, ENVIRONMENT_PREFIX, Settings, get_settings, load_settings, node_environment

if TYPE_CHECKING:
    from cluster.db import Database

log = logging.getLogger(__name__)

# By import path, because `cluster` imports no package above it.
ACTORS = {
    "events": "cluster.events:Events",
    "monitor": "cluster.servers.monitor:Monitor",
    "dispatcher": "jobs.dispatch.dispatcher:Dispatcher",
}
APPLICATION = "serve.deployment:build_application"
DECLARE_SERVICES = "pipelines.media.check_services:declare_services"
RAY_TIMEOUTS = 180, 180
"""Seconds until Ray must be reachable, and until it must be joined."""
EXTERNAL_RAY_TIMEOUTS = 5, 60  # such a cluster runs already

OnStep = Callable[[str, str], None]


class NoAdmin(SettingsError):
    """Every request needs a credential, and nobody could administer the server: `forgearr user add EMAIL --admin`."""

    code = "NO_ADMIN"


def bring_up(settings: Settings, on_step: OnStep) -> None:
    storage.check()
    asyncio.run(_prepare_database(settings, on_step))
    actors = {name: _import_object(path) for name, path in ACTORS.items()}
    build_application = _import_object(APPLICATION)
    # All of the above runs while Ray starts, which takes longer.
    _connect(settings, on_step)
    if settings.ray.address:
        NodeVersions().require_same()
    _start_actors(actors, settings.ray_namespace, on_step)
    _deploy(build_application(settings), settings, on_step)


def take_down(settings: Settings, on_step: OnStep) -> None:
    """Remove what `bring_up` started from a cluster that others may use too."""
    from ray import serve as ray_serve
    from ray.serve.exceptions import RayServeException

    _connect(settings, on_step)
    with suppress(RayServeException):  # `bring_up` may have failed before it started Serve
        ray_serve.delete(settings.ray_namespace)
        if not ray_serve.status().applications:
            ray_serve.shutdown()  # no other application is served on this cluster
    _end_actors(settings.ray_namespace)
    on_step("actors", "stopped")


def _end_actors(namespace: str) -> None:
    import ray

    # The dispatcher is killed before the workers, because it replaces them. The next round finds a worker that it has
    # just replaced.
    while names := sorted(_named_actors(namespace), key=lambda name: name not in ACTORS):
        for name in names:
            with suppress(ValueError):  # it has ended already
                ray.kill(ray.get_actor(name, namespace=namespace))
        time.sleep(0.2)


def _named_actors(namespace: str) -> list[str]:
    from ray.util import list_named_actors

    actors: list[Any] = list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == namespace]


async def _prepare_database(settings: Settings, on_step: OnStep) -> None:
    from cluster import audit_log
    from cluster.db import get_database
    from cluster.identity import has_admin
    from cluster.migrations import migrate
    from cluster.ownership import LOCAL

    await migrate()
    database = get_database()
    async with database.transaction() as session:
        is_refused = settings.auth_required and not await has_admin(session)
        outcome = "refused" if is_refused else "succeeded"
        audit_log.record(session, "settings.apply", LOCAL, outcome=outcome, **_changed_settings())
    await _import_object(DECLARE_SERVICES)(database)
    await _warn_of_unreadable_secrets(database, on_step)
    await database.close()
    if is_refused:
        raise NoAdmin
    on_step("database", "SQLite" if database.is_sqlite else "PostgreSQL")


async def _warn_of_unreadable_secrets(database: "Database", on_step: OnStep) -> None:
    from cluster import sealing

    if secrets.has_old_sealing_key():
        on_step("warning", "an old sealing key is accepted too: `forgearr keys rotate` ends that")
    async with database.read_transaction() as session:
        unreadable = await sealing.find_unreadable(session)
    for secret in unreadable:
        log.warning("%s cannot be opened: enter it again with %s", secret.name, secret.entered_by)
    if unreadable:
        text = f"{len(unreadable)} stored secrets cannot be opened with the sealing key"
        on_step("warning", f"{text}: `forgearr keys check` lists them")


def _changed_settings() -> dict[str, str]:
    """The settings that are not the defaults, with secrets masked."""
    rows = load_settings().rows()
    return {key: logs.redact(value) for key, value, origin in rows if origin != DEFAULTS}


def _import_object(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _connect(settings: Settings, on_step: OnStep) -> None:
    """Join Ray, which may still be starting."""
    import ray

    address = settings.ray.address or f"127.0.0.1:{settings.ray.port}"
    reach_timeout, join_timeout = EXTERNAL_RAY_TIMEOUTS if settings.ray.address else RAY_TIMEOUTS
    started = time.monotonic()
    # `ray.init` would wait for minutes if nothing listens at the address.
    while not processes.is_reachable(address):
        if time.monotonic() - started > reach_timeout:
            raise Unavailable(f"No Ray cluster answers at {address}.")
        time.sleep(0.1)
    while not ray.is_initialized():
        try:
            ray.init(
                address=address,
                namespace=settings.ray_namespace,
                runtime_env=_runtime_environment(settings),
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            if time.monotonic() - started > join_timeout:
                raise Unavailable(f"The Ray cluster at {address} cannot be joined: {error}.") from error
            time.sleep(0.2)
    resources = ray.cluster_resources()
    on_step("ray", f"{address}, {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs")


def _runtime_environment(settings: Settings) -> dict[str, Any] | None:
    """Return our settings for a cluster that others started. The processes of our own Ray inherit them."""
    if settings.ray.address is None:
        return None
    secrets.create_shared_keys()
    # A node whose own forgearr.yaml does not name this cluster would require no credential.
    chosen = {"AUTH__REQUIRED": "true", "RAY__NAMESPACE": settings.ray_namespace}
    return {"env_vars": node_environment() | {f"{ENVIRONMENT_PREFIX}{name}": value for name, value in chosen.items()}}


def _start_actors(classes: dict[str, Any], namespace: str, on_step: OnStep) -> None:
    import ray
    from ray.exceptions import ActorDiedError

    # On a cluster of others, those of an earlier `up` that was killed may live, with its code and its settings.
    _end_actors(namespace)
    handles: list[Any] = []
    for name, actor_class in classes.items():
        options = {"name": name, "namespace": namespace, "lifetime": "detached"}
        actor = ray.remote(actor_class).options(num_cpus=0, max_restarts=-1, max_concurrency=1000, **options)
        handles.append(actor.remote())
    try:
        ray.get([handle.__ray_ready__.remote() for handle in handles])
    except ActorDiedError as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise Unavailable(f"A process of Forgearr cannot start on its node: {logs.redact(reason)}") from error
    on_step("actors", ", ".join(classes))


def _deploy(application: Any, settings: Settings, on_step: OnStep) -> None:
    from ray import serve as ray_serve
    from ray.exceptions import RayTaskError
    from ray.serve.exceptions import RayServeException

    # With HAProxy, all parts of Serve listen on loopback; only HAProxy listens on serve.host.
    host = "127.0.0.1" if "RAY_SERVE_HAPROXY_BINARY_PATH" in os.environ else settings.serve.host
    ray_serve.start(http_options={"host": host, "port": settings.serve.port})
    try:
        ray_serve.run(application, name=settings.ray_namespace, route_prefix="/")
    except RayTaskError as error:
        if isinstance(error.cause, RayServeException):  # another application has the path
            raise Unavailable(f"Ray Serve refuses the gateway: {error.cause}") from error
        raise
    on_step("gateway", settings.url)


def main(direction: str) -> int:
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    # The output of libraries goes to the log, so that the supervisor reads reports only.
    os.dup2(2, 1)

    def write_report(**message: str) -> None:
        reports.write(json.dumps(message) + "\n")

    try:
        logs.configure("bringup")
        action = {"up": bring_up, "down": take_down}[direction]
        action(get_settings(), lambda step, detail: write_report(step=step, detail=detail))
    except ForgearrError as error:
        write_report(error=error.message)
        return 1
    except Exception as error:
        log.exception("could not bring Forgearr %s", direction)
        write_report(error=f"{type(error).__name__}: {logs.redact(str(error))}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
