"""The versions of models there are, and which one is served: MLflow's model registry, over its REST API.

A version's facts are tags on it; its files are artifacts of the run that made it. MLflow reserves the alias `latest`
for the newest version, which is not what `NAME:latest` means to those who use a model: that is the alias `served` here.
"""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster import tracking
from cluster.errors import Conflict, NotFound, Unavailable
from cluster.settings import get_settings
from cluster.tracking import Tracking, TrackingRefused
from pipelines.training import blobs, model_cache, tiny
from pipelines.training.model_cache import keep

__all__ = [
    "File",
    "Manner",
    "Model",
    "ModelNotFound",
    "NoEarlierVersion",
    "Registry",
    "RegistryOff",
    "Version",
    "VersionNeeded",
    "VersionServed",
    "connect",
    "keep",
    "parse",
]

SERVED = "served"
REFERENCE = re.compile(r"([a-z0-9][a-z0-9._-]{0,99})(?::(?:latest|v([1-9]\d{0,8})))?")
JOB_ID = re.compile(r"[\w-]+")
BLOBS = "forgearr:/blobs"
"""Where MLflow is told that the files of a version are, when they lie in storage, by their SHA-256, and not with it."""
PAGE = 1000
LONGEST_HISTORY = 100
OnProgress = Callable[[int, int], None]
"""Hears how many bytes of how many have passed."""


class ModelNotFound(NotFound):
    """There is no such model."""

    code = "MODEL_NOT_FOUND"


class NoEarlierVersion(Conflict):
    """No other version was served before the one that is."""

    code = "NO_EARLIER_VERSION"


class VersionServed(Conflict):
    """A version that is served cannot be deleted."""

    code = "VERSION_SERVED"


class VersionNeeded(Conflict):
    """A version that adapters stand on cannot be deleted before them."""

    code = "VERSION_NEEDED"


class RegistryOff(Unavailable):
    """Models are registered in MLflow, which is switched off: set mlflow.enabled to true and start Forgearr again."""

    code = "MODEL_REGISTRY_OFF"
    retryable = False


@dataclass(frozen=True)
class File:
    name: str
    quantization: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manner:
    """What a model brings along for requests that do not say it themselves."""

    template: str = ""  # of conversations, in Jinja; empty: that of the file
    system: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict[str, Any])  # named as Ollama's options
    messages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])  # a conversation's beginning
    license: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class Version:
    name: str
    number: int
    run_id: str  # of MLflow, which holds the files; empty: they are blobs
    files: list[File]  # the first one is served; none: the adapter is, on its base model
    adapter: File | None  # the adapter alone, as a GGUF LoRA
    base_model: str
    job_id: str  # the fine_tune that made it; empty: it was made from files
    export_job_id: str
    passed: bool | None  # its validation; None before one
    created_at: datetime
    reasons: list[str] = field(default_factory=list[str])  # why it did not pass
    manner: Manner = field(default_factory=Manner)
    parent: str = ""  # the version that it has its files from
    comparison: Mapping[str, Any] | None = None  # with what was served when it was made

    @property
    def reference(self) -> str:
        return f"{self.name}:v{self.number}"

    @property
    def file(self) -> File:
        """The one that is served."""
        if self.files:
            return self.files[0]
        assert self.adapter is not None
        return self.adapter

    @property
    def is_adapter(self) -> bool:
        """It is served on its base model, a version or forgearr/tiny, which it shares with others."""
        return not self.files


@dataclass(frozen=True)
class Model:
    name: str
    served: Version | None
    versions: list[Version]  # newest first


class Registry:
    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking

    async def register(
        self,
        name: str,
        run_id: str,
        files: Sequence[tuple[File, Path]],
        adapter: tuple[File, Path] | None = None,
        *,
        base_model: str,
        job_id: str,
        export_job_id: str,
        on_progress: OnProgress = lambda done, total: None,
    ) -> Version:
        """Upload files and make them the next version of `name`. Told twice by the same export, it is one version."""
        await self._make_model(name)
        if known := await self._of_export(name, export_job_id):
            return known[-1]
        folder = f"gguf/{export_job_id}"
        source = f"{await self._tracking.artifacts_of(run_id)}/{folder}"
        everything = [*files, *([adapter] if adapter else [])]
        total, before = sum(file.bytes for file, _ in everything), 0
        for file, path in everything:
            done = before
            await self._tracking.upload(
                run_id, f"{folder}/{file.name}", path, lambda sent, done=done: on_progress(done + sent, total)
            )
            before += file.bytes
        facts = _facts([file for file, _ in files], adapter[0] if adapter else None, base_model)
        facts |= {"job_id": job_id, "export_job_id": export_job_id}
        await self._make(name, source, run_id, facts, _description(base_model, job_id, export_job_id))
        return await self._first_of_export(name, export_job_id)

    async def register_blobs(
        self, name: str, files: Sequence[File], adapter: File | None = None, *, base_model: str = "", manner: Manner
    ) -> Version:
        """Make blobs, which the caller has just touched, the next version of `name`: a model, or an adapter alone."""
        await self._make_model(name)
        facts = _facts(files, adapter, base_model) | _of_manner(manner)
        names = ", ".join(file.name for file in [*files, adapter] if file is not None)
        made = await self._make(name, BLOBS, "", facts, f"Made from {names}{f' for {base_model}' if adapter else ''}.")
        if not files:
            await self._keep_if_there(made, base_model)
        return made

    async def copy(self, version: Version, name: str, manner: Manner | None = None) -> Version:
        """The same files as the next version of `name`, perhaps in another manner. No file is copied."""
        row = await self._version_row(version.name, version.number)
        await self._make_model(name)
        facts = {tag["key"].removeprefix("forgearr."): tag.get("value", "") for tag in row["tags"]}
        # It is nothing that an export has made, or may make once more.
        facts |= {"export_job_id": "", "parent": version.reference}
        facts.pop("comparison", None)
        if manner is not None and manner != version.manner:
            unlike = {"manner", "passed", "reasons"}
            facts = {key: value for key, value in facts.items() if key not in unlike} | _of_manner(manner)
        made = await self._make(name, row["source"], row.get("run_id", ""), facts, f"The files of {version.reference}.")
        await self._keep_if_there(made, version.reference)
        if not version.files:
            await self._keep_if_there(made, version.base_model)
        return made

    async def blobs(self) -> set[str]:
        """The SHA-256 of every blob that a version uses."""
        versions = [_version(row) for row in await self._version_rows() if row["source"] == BLOBS]
        return {file.sha256 for version in versions for file in [*version.files, version.adapter] if file is not None}

    async def find(self, reference: str) -> Version:
        """The version that NAME, NAME:latest (both: the one served) or NAME:v3 names."""
        name, number = parse(reference)
        if number is not None:
            return _version(await self._version_row(name, number))
        try:
            answer = await self._tracking.call("GET", "registered-models/alias", params={"name": name, "alias": SERVED})
        except TrackingRefused as refusal:
            # 404: no such model; 400: it has no such alias.
            if refusal.details.get("status") not in {400, 404}:
                raise
            raise ModelNotFound(f"No version of a model '{name}' is served.") from refusal
        if not _is_ours(answer["model_version"]):
            raise ModelNotFound(f"'{name}' in MLflow is no model of Forgearr's.")
        return _version(answer["model_version"])

    async def find_export(self, export_job_id: str) -> Version:
        """The version that an export job has made."""
        condition = f"tags.`forgearr.export_job_id` = '{export_job_id}'"
        found = await self._versions(condition) if JOB_ID.fullmatch(export_job_id) else []
        if not found:
            raise ModelNotFound(f"There is no model version of an export job '{export_job_id}'.")
        return found[-1]

    async def adapters_of(self, base: str) -> list[Version]:
        """The versions that are adapters for this one, newest first."""
        found = await self._versions(f"tags.`forgearr.base_model` = '{base}'") if "'" not in base else []
        return sorted((one for one in found if one.is_adapter), key=lambda one: one.created_at, reverse=True)

    async def models(self) -> list[Model]:
        """Every model that has a version of ours, by name."""
        rows = await self._search("registered-models/search", "registered_models")
        versions: dict[str, list[Version]] = {}
        for version in await self._versions():
            versions.setdefault(version.name, []).append(version)
        return [
            _model(versions[row["name"]], _served(row))
            for row in sorted(rows, key=lambda row: row["name"])
            if row["name"] in versions
        ]

    async def model(self, name: str) -> Model:
        served = _served(await self._model_row(name))
        versions = await self._versions(f"name = '{name}'")
        if not versions:
            raise ModelNotFound(f"There is no model '{name}'.")
        return _model(versions, served)

    async def point(self, name: str, number: int) -> int | None:
        """Serve this version from now on; returns the number of the one that was served before, if another one was."""
        row = await self._model_row(name)
        await self._version_row(name, number)
        served = _served(row)
        if served == number:
            return (_history(row) or [None])[-1]
        if served is not None:
            # First: should we end between the two, an entry that equals what is served means nothing.
            await self._remember(name, [*_history(row), served])
        await self._serve(name, number)
        return served

    async def roll_back(self, name: str) -> tuple[Version, int]:
        """Serve what was served before; returns it, and the number of the one that was served until now."""
        row = await self._model_row(name)
        served, history = _served(row), _history(row)
        known = {version.number: version for version in await self._versions(f"name = '{name}'")}
        earlier = [number for number in history if number in known]
        if served is None or not earlier:
            raise NoEarlierVersion(f"No version of '{name}' that is still there was served before the one that is.")
        await self._serve(name, earlier[-1])
        await self._remember(name, earlier[:-1])
        return known[earlier[-1]], served

    async def judge(self, name: str, number: int, passed: bool, reasons: Sequence[str] = ()) -> None:
        """Write down whether a version has passed its validation, and why not."""
        for key, value in (("reasons", list(reasons)), ("passed", passed)):
            wanted = {**_key(name, number), "key": f"forgearr.{key}", "value": json.dumps(value)}
            await self._tracking.call("POST", "model-versions/set-tag", json=wanted)

    async def remember_comparison(self, name: str, number: int, comparison: Mapping[str, Any]) -> None:
        """Write down how a version did beside the one that was served."""
        wanted = {**_key(name, number), "key": "forgearr.comparison", "value": json.dumps(comparison)}
        await self._tracking.call("POST", "model-versions/set-tag", json=wanted)

    async def fetch(
        self, version: Version, file: File | None = None, on_progress: OnProgress = lambda done, total: None
    ) -> Path:
        """A copy of a version's file on this machine; without `file`, of the one that is served. Only to be read."""
        wanted = file or version.file

        async def download(target: Path) -> str:
            row = await self._version_row(version.name, version.number)
            if row["source"] == BLOBS:
                return await asyncio.to_thread(blobs.copy, wanted.sha256, target)
            address = f"{row['source']}/{wanted.name}"
            return await self._tracking.download(address, target, lambda done: on_progress(done, wanted.bytes))

        return await model_cache.obtain(wanted.sha256, wanted.bytes, download)

    async def delete_version(self, name: str, number: int) -> None:
        """Remove a version and its files; its number is not given again."""
        row = await self._version_row(name, number)
        if _served(await self._model_row(name)) == number:
            raise VersionServed(
                f"{name}:v{number} is served: deploy another version, or roll back, before you delete it."
            )
        await self._refuse_if_needed([f"{name}:v{number}"])
        await self._delete_version(row)

    async def delete_model(self, name: str) -> None:
        """Remove all versions of a model and their files, served or not.

        Its name stays in MLflow, and with it the count: NAME:v3 means the same for good, or nothing.
        """
        await self._model_row(name)
        rows = await self._version_rows(f"name = '{name}'")
        await self._refuse_if_needed([f"{name}:v{row['version']}" for row in rows])
        for row in rows:
            await self._delete_version(row)

    async def _refuse_if_needed(self, references: Sequence[str]) -> None:
        for reference in references:
            if others := [one for one in await self.adapters_of(reference) if one.reference not in references]:
                raise VersionNeeded(f"{reference} cannot be deleted: {others[0].reference} is an adapter for it.")

    async def _make_model(self, name: str) -> None:
        if await self._tracking.call("GET", "registered-models/get", missing={}, params={"name": name}):
            return
        try:
            await self._tracking.call("POST", "registered-models/create", json={"name": name})
        except TrackingRefused:
            await self._model_row(name)  # another export has just made it

    async def _of_export(self, name: str, export_job_id: str) -> list[Version]:
        return await self._versions(f"name = '{name}' AND tags.`forgearr.export_job_id` = '{export_job_id}'")

    async def _first_of_export(self, name: str, export_job_id: str) -> Version:
        """The version of an export. Two, of a worker that was given up and its successor, become one again."""
        *later, first = await self._of_export(name, export_job_id)
        for version in later:
            key = _key(name, version.number)
            await self._tracking.call("DELETE", "model-versions/delete", missing={}, json=key)
        return first

    async def _model_row(self, name: str) -> dict[str, Any]:
        found = await self._tracking.call("GET", "registered-models/get", missing={}, params={"name": name})
        if not found:
            raise ModelNotFound(f"There is no model '{name}'.")
        return found["registered_model"]

    async def _version_row(self, name: str, number: int) -> dict[str, Any]:
        found = await self._tracking.call("GET", "model-versions/get", missing={}, params=_key(name, number))
        if not found or not _is_ours(found["model_version"]):
            raise ModelNotFound(f"There is no model version {name}:v{number}.")
        return found["model_version"]

    async def _versions(self, condition: str = "") -> list[Version]:
        return [_version(row) for row in await self._version_rows(condition)]

    async def _version_rows(self, condition: str = "") -> list[dict[str, Any]]:
        """All of ours that fulfil a condition, newest first."""
        rows = await self._search("model-versions/search", "model_versions", condition)
        return sorted((row for row in rows if _is_ours(row)), key=lambda row: -int(row["version"]))

    async def _search(self, path: str, key: str, condition: str = "") -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        wanted: dict[str, Any] = {"max_results": PAGE, **({"filter": condition} if condition else {})}
        while True:
            answer = await self._tracking.call("GET", path, params=wanted)
            rows += answer.get(key, [])
            if not answer.get("next_page_token"):
                return rows
            wanted["page_token"] = answer["next_page_token"]

    async def _serve(self, name: str, number: int) -> None:
        await self._tracking.call("POST", "registered-models/alias", json={**_key(name, number), "alias": SERVED})

    async def _remember(self, name: str, history: list[int]) -> None:
        value = json.dumps(history[-LONGEST_HISTORY:])
        wanted = {"name": name, "key": "forgearr.history", "value": value}
        await self._tracking.call("POST", "registered-models/set-tag", json=wanted)

    async def _make(self, name: str, source: str, run_id: str, facts: Mapping[str, str], description: str) -> Version:
        wanted = {
            "name": name,
            "source": source,
            "run_id": run_id,
            "tags": [{"key": f"forgearr.{key}", "value": value} for key, value in facts.items()],
            "description": description,
        }
        return _version((await self._tracking.call("POST", "model-versions/create", json=wanted))["model_version"])

    async def _keep_if_there(self, made: Version, reference: str) -> None:
        """A version that needs another one: should that have been deleted just before, there is neither."""
        if reference == tiny.NAME:
            return
        try:
            await self.find(reference)
        except ModelNotFound:
            await self._delete_version(await self._version_row(made.name, made.number))
            raise

    async def _delete_version(self, row: dict[str, Any]) -> None:
        """Its files go with it, unless a copy has them too. Of blobs, a sweep takes care."""
        await self._tracking.call("DELETE", "model-versions/delete", json=_key(row["name"], int(row["version"])))
        if row["source"] != BLOBS and not await self._version_rows(f"source_path = '{row['source']}'"):
            await self._tracking.delete_artifacts(row["source"])


@asynccontextmanager
async def connect() -> AsyncGenerator[Registry]:
    """The registry of this installation."""
    uri = get_settings().mlflow_uri
    if uri is None:
        raise RegistryOff
    async with tracking.connect(uri) as mlflow:
        yield Registry(mlflow)


def parse(reference: str) -> tuple[str, int | None]:
    """The name of a model, and the number of a version where one is named."""
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise ModelNotFound(f"There is no model '{reference}'; versions are named NAME:latest or NAME:v3.")
    return match[1], int(match[2]) if match[2] else None


def _facts(files: Sequence[File], adapter: File | None, base_model: str) -> dict[str, str]:
    return {
        "files": json.dumps([asdict(file) for file in files]),
        "adapter": json.dumps(asdict(adapter) if adapter else None),
        "base_model": base_model,
        "job_id": "",
        "export_job_id": "",
    }


def _of_manner(manner: Manner) -> dict[str, str]:
    return {"manner": json.dumps(asdict(manner))} if manner != Manner() else {}


def _key(name: str, number: int) -> dict[str, str]:
    return {"name": name, "version": str(number)}


def _description(base_model: str, job_id: str, export_job_id: str) -> str:
    """What MLflow's pages show of a version, with the way back to its jobs."""
    jobs = f"{get_settings().url}/api/v1/jobs"
    made, exported = (f"[{job}]({jobs}/{job})" for job in (job_id, export_job_id))
    return f"Made from `{base_model}` by {made}, exported by {exported}."


def _is_ours(row: dict[str, Any]) -> bool:
    return any(tag["key"] == "forgearr.files" for tag in row.get("tags", []))


def _version(row: dict[str, Any]) -> Version:
    facts = {tag["key"].removeprefix("forgearr."): tag.get("value", "") for tag in row["tags"]}
    adapter = json.loads(facts["adapter"])
    return Version(
        name=row["name"],
        number=int(row["version"]),
        run_id=row.get("run_id", ""),
        files=[File(**file) for file in json.loads(facts["files"])],
        adapter=File(**adapter) if adapter else None,
        base_model=facts["base_model"],
        job_id=facts["job_id"],
        export_job_id=facts["export_job_id"],
        passed=json.loads(facts["passed"]) if "passed" in facts else None,
        reasons=json.loads(facts.get("reasons", "[]")),
        manner=Manner(**json.loads(facts.get("manner", "{}"))),
        parent=facts.get("parent", ""),
        comparison=json.loads(facts.get("comparison", "null")),
        created_at=datetime.fromtimestamp(int(row["creation_timestamp"]) / 1000, UTC),
    )


def _model(versions: list[Version], served: int | None) -> Model:
    return Model(
        name=versions[0].name,
        served=next((version for version in versions if version.number == served), None),
        versions=versions,
    )


def _served(row: dict[str, Any]) -> int | None:
    return next((int(alias["version"]) for alias in row.get("aliases", []) if alias["alias"] == SERVED), None)


def _history(row: dict[str, Any]) -> list[int]:
    """The numbers that were served before the one that is, the last of them last."""
    tags = {tag["key"]: tag["value"] for tag in row.get("tags", [])}
    history: list[int] = json.loads(tags.get("forgearr.history", "[]"))
    while history and history[-1] == _served(row):
        history.pop()
    return history
