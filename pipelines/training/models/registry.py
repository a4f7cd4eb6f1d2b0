"""The versions of models there are, and which one is served: MLflow's model registry, over its REST API.

A version's facts are tags on it; its files are artifacts of the run that made it. MLflow reserves the alias `latest`
for the newest version, which is not what `NAME:latest` means to those who use a model: that is the alias `served` here.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cluster import mlflow_client
from cluster.mlflow_client import Tracking, TrackingRefused
from cluster.settings import get_settings
from pipelines.training.models import blobs, tiny
from pipelines.training.models import cache as model_cache
from pipelines.training.models.cache import keep
from pipelines.training.models.mlflow_rows import (
    BLOBS,
    LONGEST_HISTORY,
    defaults_as_tags,
    is_ours,
    new_model,
    served_history,
    served_number,
    version_description,
    version_key,
    version_of_row,
    version_tags,
)
from pipelines.training.models.versions import (
    JOB_ID,
    SERVED,
    File,
    Manner,
    Model,
    ModelNotFound,
    NoEarlierVersion,
    RegistryOff,
    Version,
    VersionNeeded,
    VersionServed,
    parse,
)

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
PAGE = 1000
OnProgress = Callable[[int, int], None]
"""Hears how many bytes of how many have passed."""


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
        facts = version_tags([file for file, _ in files], adapter[0] if adapter else None, base_model)
        facts |= {"job_id": job_id, "export_job_id": export_job_id}
        await self._make(name, source, run_id, facts, version_description(base_model, job_id, export_job_id))
        return await self._first_of_export(name, export_job_id)

    async def register_blobs(
        self, name: str, files: Sequence[File], adapter: File | None = None, *, base_model: str = "", manner: Manner
    ) -> Version:
        """Make blobs, which the caller has just touched, the next version of `name`: a model, or an adapter alone."""
        await self._make_model(name)
        facts = version_tags(files, adapter, base_model) | defaults_as_tags(manner)
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
            facts = {key: value for key, value in facts.items() if key not in unlike} | defaults_as_tags(manner)
        made = await self._make(name, row["source"], row.get("run_id", ""), facts, f"The files of {version.reference}.")
        await self._keep_if_there(made, version.reference)
        if not version.files:
            await self._keep_if_there(made, version.base_model)
        return made

    async def blobs(self) -> set[str]:
        """The SHA-256 of every blob that a version uses."""
        versions = [version_of_row(row) for row in await self._version_rows() if row["source"] == BLOBS]
        return {file.sha256 for version in versions for file in [*version.files, version.adapter] if file is not None}

    async def find(self, reference: str) -> Version:
        """The version that NAME, NAME:latest (both: the one served) or NAME:v3 names."""
        name, number = parse(reference)
        if number is not None:
            return version_of_row(await self._version_row(name, number))
        try:
            answer = await self._tracking.call("GET", "registered-models/alias", params={"name": name, "alias": SERVED})
        except TrackingRefused as refusal:
            # 404: no such model; 400: it has no such alias.
            if refusal.details.get("status") not in {400, 404}:
                raise
            raise ModelNotFound(f"No version of a model '{name}' is served.") from refusal
        if not is_ours(answer["model_version"]):
            raise ModelNotFound(f"'{name}' in MLflow is no model of Forgearr's.")
        return version_of_row(answer["model_version"])

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
            new_model(versions[row["name"]], served_number(row))
            for row in sorted(rows, key=lambda row: row["name"])
            if row["name"] in versions
        ]

    async def model(self, name: str) -> Model:
        served = served_number(await self._model_row(name))
        versions = await self._versions(f"name = '{name}'")
        if not versions:
            raise ModelNotFound(f"There is no model '{name}'.")
        return new_model(versions, served)

    async def point(self, name: str, number: int) -> int | None:
        """Serve this version from now on; returns the number of the one that was served before, if another one was."""
        row = await self._model_row(name)
        await self._version_row(name, number)
        served = served_number(row)
        if served == number:
            return (served_history(row) or [None])[-1]
        if served is not None:
            # First: should we end between the two, an entry that equals what is served means nothing.
            await self._remember(name, [*served_history(row), served])
        await self._serve(name, number)
        return served

    async def roll_back(self, name: str) -> tuple[Version, int]:
        """Serve what was served before; returns it, and the number of the one that was served until now."""
        row = await self._model_row(name)
        served, history = served_number(row), served_history(row)
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
            wanted = {**version_key(name, number), "key": f"forgearr.{key}", "value": json.dumps(value)}
            await self._tracking.call("POST", "model-versions/set-tag", json=wanted)

    async def remember_comparison(self, name: str, number: int, comparison: Mapping[str, Any]) -> None:
        """Write down how a version did beside the one that was served."""
        wanted = {**version_key(name, number), "key": "forgearr.comparison", "value": json.dumps(comparison)}
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
        if served_number(await self._model_row(name)) == number:
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
            key = version_key(name, version.number)
            await self._tracking.call("DELETE", "model-versions/delete", missing={}, json=key)
        return first

    async def _model_row(self, name: str) -> dict[str, Any]:
        found = await self._tracking.call("GET", "registered-models/get", missing={}, params={"name": name})
        if not found:
            raise ModelNotFound(f"There is no model '{name}'.")
        return found["registered_model"]

    async def _version_row(self, name: str, number: int) -> dict[str, Any]:
        found = await self._tracking.call("GET", "model-versions/get", missing={}, params=version_key(name, number))
        if not found or not is_ours(found["model_version"]):
            raise ModelNotFound(f"There is no model version {name}:v{number}.")
        return found["model_version"]

    async def _versions(self, condition: str = "") -> list[Version]:
        return [version_of_row(row) for row in await self._version_rows(condition)]

    async def _version_rows(self, condition: str = "") -> list[dict[str, Any]]:
        """All of ours that fulfil a condition, newest first."""
        rows = await self._search("model-versions/search", "model_versions", condition)
        return sorted((row for row in rows if is_ours(row)), key=lambda row: -int(row["version"]))

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
        await self._tracking.call(
            "POST", "registered-models/alias", json={**version_key(name, number), "alias": SERVED}
        )

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
        return version_of_row(
            (await self._tracking.call("POST", "model-versions/create", json=wanted))["model_version"]
        )

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
        await self._tracking.call("DELETE", "model-versions/delete", json=version_key(row["name"], int(row["version"])))
        if row["source"] != BLOBS and not await self._version_rows(f"source_path = '{row['source']}'"):
            await self._tracking.delete_artifacts(row["source"])


@asynccontextmanager
async def connect() -> AsyncGenerator[Registry]:
    """The registry of this installation."""
    uri = get_settings().mlflow_uri
    if uri is None:
        raise RegistryOff
    async with mlflow_client.connect(uri) as mlflow:
        yield Registry(mlflow)
