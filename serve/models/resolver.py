"""Which model a request means: the registry, remembered for a moment, so that a request costs MLflow nothing.

When MLflow does not answer, what was known last still holds: whatever was served goes on being served.
"""

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Generic, TypeVar

from cluster.db import Database, get_database
from cluster.errors import Unavailable
from cluster.ownership import Owner
from cluster.settings import get_settings
from jobs import outputs
from jobs.queue import JobNotFound
from pipelines.training.models import registry, tiny
from pipelines.training.models.versions import Model, ModelNotFound, Version
from serve.engines.ollama.engine import OllamaEngine
from serve.engines.protocol import Folder, Remote, Source
from serve.models import fine_tuned_names

JOB = re.compile(r"job_\d{8}_\d{6}_[a-z0-9]{4,}")
EARLIEST = datetime.fromtimestamp(0, UTC)
"""Nobody knows when a model was made that the settings name."""
FRESH_SECONDS = 1.0
PATIENCE_SECONDS = 3.0
"""How long to wait for MLflow where an older answer is at hand."""
MOST_REMEMBERED = 1000

log = logging.getLogger(__name__)

Known = TypeVar("Known")


@dataclass(frozen=True)
class Meant:
    """What a reference stands for now."""

    reference: str  # a name that stays with it: NAME:v3
    source: Source


def folders() -> dict[str, Folder]:
    """The models that the settings name."""
    return {name: Folder(None, model, EARLIEST) for name, model in get_settings().engines.folders.items()}


class Models:
    def __init__(self, find_database: Callable[[], Database] = get_database) -> None:
        """A job, whose event loop is another one than its process's, brings a database of its own."""
        self._database = find_database
        self._versions: dict[str, _Remembered[Version]] = {}
        self._models = _Remembered(_all_models)
        self._remote = _Remembered(_all_remote)

    async def resolve(self, reference: str, owner: Owner) -> Meant:
        """What NAME, NAME:latest, NAME:v3, forgearr/tiny, ft:…, a training's id or a name of the settings means."""
        if reference.startswith(fine_tuned_names.PREFIX):
            async with self._database().reading() as session:
                tuned = await fine_tuned_names.resolve(session, reference, owner)
            return Meant(reference, tuned) if isinstance(tuned, Folder) else await self.resolve(tuned, owner)
        name = reference.removesuffix(":latest")
        if name == tiny.NAME:
            return Meant(tiny.NAME, None)
        if JOB.fullmatch(name):
            return await self._trained(name, owner)
        if folder := folders().get(name):
            return Meant(name, folder)
        try:
            return await self._registered(reference)
        except (ModelNotFound, Unavailable):  # another server may have it, whatever is with ours
            wanted = {reference, f"{reference}:latest"}
            remote = next((model for model in await self._remote.get() if model.name in wanted), None)
            if remote is None:
                raise
            return Meant(remote.name, remote)

    async def _registered(self, reference: str) -> Meant:
        if not get_settings().mlflow.enabled:
            raise ModelNotFound(f"There is no model '{reference}': models are registered in MLflow, which is off.")
        known = self._versions.get(reference) or _Remembered(lambda: _find(reference))
        version = await known.get()
        # Only what exists is remembered, so that made-up names take no memory.
        if len(self._versions) >= MOST_REMEMBERED:
            self._versions.clear()
        self._versions[reference] = known
        return Meant(version.reference, version)

    async def remote(self) -> list[Remote]:
        """The models of the server elsewhere whose names are not ours; none, while it does not answer."""
        try:
            found = await self._remote.get()
        except Unavailable as error:
            log.warning("Models of a remote server are not listed: %s", error.message)
            return []
        models = await self.all()
        ours = {f"{model.name}:latest" for model in models if model.served} | {
            version.reference for model in models for version in model.versions
        }
        ours |= {f"{name}:latest" for name in (tiny.NAME, *folders())}
        return [model for model in found if model.name not in ours]

    async def all(self) -> list[Model]:
        """Every registered model, by name."""
        return await self._models.get() if get_settings().mlflow.enabled else []

    def forget(self) -> None:
        """Ask the registry anew: somebody has just changed it through this replica, and looks whether it is so."""
        self._versions.clear()
        self._models = _Remembered(_all_models)
        self._remote = _Remembered(_all_remote)

    async def _trained(self, job_id: str, owner: Owner) -> Meant:
        """What a training has made, before any export."""
        try:
            async with self._database().reading() as session:
                made = await outputs.find(session, job_id, "fine_tune", owner)
        except JobNotFound as error:
            raise ModelNotFound(f"There is no model '{job_id}'.") from error
        return Meant(made.job_id, Folder(made.result["model"], made.result["base_model"], made.finished_at))


@dataclass
class _Remembered(Generic[Known]):
    """An answer of the registry, asked for again when it is old, by one request for all that wait."""

    ask: Callable[[], Awaitable[Known]]
    _answer: list[Known] = field(default_factory=list[Known])  # none or one
    _asked_at: float = 0
    _asking: asyncio.Task[Known] | None = None

    async def get(self) -> Known:
        if self._answer and time.monotonic() - self._asked_at < FRESH_SECONDS:
            return self._answer[0]
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
            self._asking.add_done_callback(self._settle)
        asking = self._asking
        if not self._answer:
            return await asyncio.shield(asking)
        await asyncio.wait([asking], timeout=PATIENCE_SECONDS)
        if asking.done() and not isinstance(asking.exception(), Unavailable):
            return asking.result()
        return self._answer[0]

    async def _ask(self) -> Known:
        return await self.ask()

    def _settle(self, asking: asyncio.Task[Known]) -> None:
        self._asking = None
        error = asking.exception()
        if error is None:
            self._answer = [asking.result()]
        elif not isinstance(error, Unavailable):
            self._answer = []
        # Also when MLflow is away it is asked once in a while only.
        self._asked_at = time.monotonic()


async def _find(reference: str) -> Version:
    async with registry.connect() as models:
        return await models.find(reference)


async def _all_models() -> list[Model]:
    async with registry.connect() as models:
        return await models.models()


async def _all_remote() -> list[Remote]:
    return await OllamaEngine(get_settings().ollama.url).models()
