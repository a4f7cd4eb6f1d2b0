"""Resolves the name of a model to what an engine needs. Answers of the registry are cached for a moment.

So a request usually costs no call of MLflow. If MLflow does not respond, the last known answer is used: a model that
was served is still served.
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
from cluster.errors import ForgearrError, Unavailable
from cluster.ownership import Principal
from cluster.settings import get_settings
from jobs import outputs
from jobs.queue import JobNotFound
from pipelines.training.models import access, registry, tiny
from pipelines.training.models.versions import Model, ModelNotFound, Version
from serve.engines.ollama.engine import OllamaEngine
from serve.engines.protocol import ModelFolder, OllamaModel, Source
from serve.models import fine_tuned_names

JOB_ID = re.compile(r"job_\d{8}_\d{6}_[a-z0-9]{4,}")
UNKNOWN_DATE = datetime.fromtimestamp(0, UTC)
"""For models that the settings name."""
CACHE_SECONDS = 1.0
REFRESH_TIMEOUT_SECONDS = 3.0
"""How long to wait for MLflow if there is an older answer."""
MAX_CACHED_VERSIONS = 1000

log = logging.getLogger(__name__)

Value = TypeVar("Value")


@dataclass(frozen=True)
class ResolvedModel:
    """What a name refers to at the moment, for the account that has asked."""

    reference: str  # a name that does not change its meaning: NAME:v3
    source: Source
    account: str  # its id; empty: the user of this machine


def configured_folders() -> dict[str, ModelFolder]:
    """The models that the settings name."""
    return {name: ModelFolder(None, model, UNKNOWN_DATE) for name, model in get_settings().engines.folders.items()}


class ModelResolver:
    def __init__(self, find_database: Callable[[], Database] = get_database) -> None:
        """A job runs in an event loop of its own, so it provides a database of its own."""
        self._database = find_database
        self._versions: dict[str, _Cached[Version]] = {}
        self._models = _Cached(_list_models)
        self._remote = _Cached(_list_ollama_models)

    async def resolve(self, reference: str, principal: Principal) -> ResolvedModel:
        """Resolve NAME, NAME:latest, NAME:v3, forgearr/tiny, ft:…, the id of a training, or a name in the settings."""
        account = principal.id or ""
        if reference.startswith(fine_tuned_names.PREFIX):
            async with self._database().read_transaction() as session:
                tuned = await fine_tuned_names.resolve(session, reference, principal)
            return (
                ResolvedModel(reference, tuned, account)
                if isinstance(tuned, ModelFolder)
                else await self.resolve(tuned, principal)
            )
        name = reference.removesuffix(":latest")
        if name == tiny.NAME:
            return ResolvedModel(tiny.NAME, None, account)
        if JOB_ID.fullmatch(name):
            return await self._resolve_training(name, principal)
        if folder := configured_folders().get(name):
            return ResolvedModel(name, folder, account)
        try:
            return await self._resolve_registered(reference, principal)
        except (ModelNotFound, Unavailable):  # the Ollama server may have it
            names = {reference, f"{reference}:latest"}
            remote = next((model for model in await self._remote.get() if model.name in names), None)
            if remote is None:
                raise
            return ResolvedModel(remote.name, remote, account)

    async def can_use(self, reference: str, principal: Principal) -> bool:
        """Whether the principal may know of a model in memory. What cannot be resolved now is not shown."""
        if principal.is_admin:
            return True
        try:
            await self.resolve(reference, principal)
        except ForgearrError:
            return False
        return True

    async def _resolve_registered(self, reference: str, principal: Principal) -> ResolvedModel:
        if not get_settings().mlflow.enabled:
            raise ModelNotFound(f"There is no model '{reference}': models are registered in MLflow, which is disabled.")
        cached = self._versions.get(reference) or _Cached(lambda: _find(reference))
        version = await cached.get()
        # Only existing versions are cached, so that invented names take no memory.
        if len(self._versions) >= MAX_CACHED_VERSIONS:
            self._versions.clear()
        self._versions[reference] = cached
        # The cache is everybody's, so whoever asks is compared with each answer.
        access.require_visible(version, principal, reference)
        return ResolvedModel(version.reference, version, principal.id or "")

    async def list_remote(self, principal: Principal) -> list[OllamaModel]:
        """The models of the Ollama server whose names are not used here. Empty while the server does not respond."""
        try:
            remote_models = await self._remote.get()
        except Unavailable as error:
            log.warning("The models of the Ollama server are not listed: %s", error.message)
            return []
        models = await self.list_registered(principal)
        own_names = {f"{model.name}:latest" for model in models if model.served} | {
            version.reference for model in models for version in model.versions
        }
        own_names |= {f"{name}:latest" for name in (tiny.NAME, *configured_folders())}
        return [model for model in remote_models if model.name not in own_names]

    async def list_registered(self, principal: Principal) -> list[Model]:
        """The registered models that the principal may see, by name."""
        return access.visible_models(await self._models.get(), principal) if get_settings().mlflow.enabled else []

    def clear_cache(self) -> None:
        """Read the registry again: a client has changed it through this replica, and expects to see the change."""
        self._versions.clear()
        self._models = _Cached(_list_models)
        self._remote = _Cached(_list_ollama_models)

    async def _resolve_training(self, job_id: str, principal: Principal) -> ResolvedModel:
        """The model of a training, before any export."""
        try:
            async with self._database().read_transaction() as session:
                output = await outputs.find_output(session, job_id, "fine_tune", principal)
        except JobNotFound as error:
            raise ModelNotFound(f"There is no model '{job_id}'.") from error
        folder = ModelFolder(output.result["model"], output.result["base_model"], output.finished_at)
        return ResolvedModel(output.job_id, folder, principal.id or "")


@dataclass
class _Cached(Generic[Value]):
    """A cached answer of the registry. One call refreshes it for all requests that wait."""

    load: Callable[[], Awaitable[Value]]
    _value: list[Value] = field(default_factory=list[Value])  # none or one
    _loaded_at: float = 0
    _loading: asyncio.Task[Value] | None = None

    async def get(self) -> Value:
        if self._value and time.monotonic() - self._loaded_at < CACHE_SECONDS:
            return self._value[0]
        if self._loading is None:
            self._loading = asyncio.create_task(self._load())
            self._loading.add_done_callback(self._on_loaded)
        loading = self._loading
        if not self._value:
            return await asyncio.shield(loading)
        await asyncio.wait([loading], timeout=REFRESH_TIMEOUT_SECONDS)
        if loading.done() and not isinstance(loading.exception(), Unavailable):
            return loading.result()
        return self._value[0]

    async def _load(self) -> Value:
        return await self.load()

    def _on_loaded(self, task: asyncio.Task[Value]) -> None:
        self._loading = None
        error = task.exception()
        if error is None:
            self._value = [task.result()]
        elif not isinstance(error, Unavailable):
            self._value = []
        # Also after a failure, so that an unreachable MLflow is not called by every request.
        self._loaded_at = time.monotonic()


async def _find(reference: str) -> Version:
    async with registry.connect() as models:
        return await models.find(reference)


async def _list_models() -> list[Model]:
    async with registry.connect() as models:
        return await models.models()


async def _list_ollama_models() -> list[OllamaModel]:
    return await OllamaEngine(get_settings().ollama.url).models()
