"""The model registry: register, find, serve and delete versions of models, through MLflow's REST API.

The facts of a version are tags in MLflow; its files are artifacts of the run that made it, or blobs in storage. MLflow
reserves the alias `latest` for the newest version. `NAME:latest` means the version that is served: the alias `served`.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from cluster import mlflow_client
from cluster.mlflow_client import MlflowRefused, MlflowRestClient
from cluster.ownership import LOCAL, Principal
from cluster.settings import get_settings
from pipelines.training.models import blobs, tiny
from pipelines.training.models import cache as model_cache
from pipelines.training.models.mlflow_rows import (
    BLOB_SOURCE,
    MAX_HISTORY,
    defaults_as_tags,
    is_ours,
    maker_tags,
    new_model,
    readable_versions,
    require_maker,
    served_history,
    served_number,
    version_description,
    version_key,
    version_of_row,
    version_tags,
)
from pipelines.training.models.versions import (
    JOB_ID_PATTERN,
    SERVED_ALIAS,
    Model,
    ModelDefaults,
    ModelFile,
    ModelNotFound,
    NoEarlierVersion,
    RegistryDisabled,
    Version,
    VersionInUse,
    VersionServed,
    Visibility,
    parse_reference,
    unknown_model,
    unknown_version,
)

OnProgress = Callable[[int, int], None]
"""Receives the number of bytes that are done, and their total."""


class Registry:
    def __init__(self, mlflow: MlflowRestClient) -> None:
        self._mlflow = mlflow

    async def register(
        self,
        name: str,
        run_id: str,
        files: Sequence[tuple[ModelFile, Path]],
        adapter: tuple[ModelFile, Path] | None = None,
        *,
        base_model: str,
        job_id: str,
        export_job_id: str,
        principal: Principal,
        owner_id: str | None = None,
        on_progress: OnProgress = lambda done, total: None,
    ) -> Version:
        """Upload files and make them the next version of `name`, which is private if it has an owner.

        Repeated by the same export, it is one version.
        """
        await self._ensure_model(name, principal)
        if existing := await self._find_by_export(name, export_job_id):
            return existing[-1]
        folder = f"gguf/{export_job_id}"
        source = f"{await self._mlflow.artifact_uri(run_id)}/{folder}"
        all_files = [*files, *([adapter] if adapter else [])]
        total, sent_before = sum(file.bytes for file, _ in all_files), 0
        for file, path in all_files:
            done = sent_before
            await self._mlflow.upload(
                run_id, f"{folder}/{file.name}", path, lambda sent, done=done: on_progress(done + sent, total)
            )
            sent_before += file.bytes
        tags = version_tags([file for file, _ in files], adapter[0] if adapter else None, base_model)
        tags |= {"job_id": job_id, "export_job_id": export_job_id, "owner_id": owner_id or ""}
        await self._create_version(name, source, run_id, tags, version_description(base_model, job_id, export_job_id))
        return await self._merge_export_versions(name, export_job_id)

    async def register_blobs(
        self,
        name: str,
        files: Sequence[ModelFile],
        adapter: ModelFile | None = None,
        *,
        base_model: str = "",
        defaults: ModelDefaults,
    ) -> Version:
        """Make blobs the next version of `name`: a model, or an adapter alone. The caller has just touched them."""
        await self._ensure_model(name, LOCAL)  # only administrators do this
        tags = version_tags(files, adapter, base_model) | defaults_as_tags(defaults)
        names = ", ".join(file.name for file in [*files, adapter] if file is not None)
        version = await self._create_version(
            name, BLOB_SOURCE, "", tags, f"Made from {names}{f' for {base_model}' if adapter else ''}."
        )
        if not files:
            await self._require_or_delete(version, base_model)
        return version

    async def copy(self, version: Version, name: str, defaults: ModelDefaults | None = None) -> Version:
        """Make the files of a version the next version of `name`, with other defaults if given. No file is copied."""
        row = await self._version_row(version.name, version.number)
        await self._ensure_model(name, LOCAL)  # only administrators do this
        tags = {tag["key"].removeprefix("forgearr."): tag.get("value", "") for tag in row["tags"]}
        # The copy must not be found as the version of the export job. It belongs to those who may copy.
        tags |= {"export_job_id": "", "parent": version.reference, "owner_id": "", "visibility": ""}
        tags.pop("comparison", None)
        if defaults is not None and defaults != version.defaults:
            replaced_tags = {"manner", "passed", "reasons", "validation"}
            tags = {key: value for key, value in tags.items() if key not in replaced_tags} | defaults_as_tags(defaults)
        copied = await self._create_version(
            name, row["source"], row.get("run_id", ""), tags, f"The files of {version.reference}."
        )
        await self._require_or_delete(copied, version.reference)
        if not version.files:
            await self._require_or_delete(copied, version.base_model)
        return copied

    async def require_name(self, name: str, principal: Principal) -> None:
        """Raise ModelNameTaken if the principal may not register versions under this name."""
        if row := await self._mlflow.call("GET", "registered-models/get", default={}, params={"name": name}):
            require_maker(row["registered_model"], principal)

    async def blobs(self) -> dict[str, str]:
        """The SHA-256 of every blob that a version uses, with the name of its model."""
        versions = [version_of_row(row) for row in await self._version_rows() if row["source"] == BLOB_SOURCE]
        return {
            file.sha256: version.name
            for version in versions
            for file in [*version.files, version.adapter]
            if file is not None
        }

    async def identities(self) -> dict[str, str]:
        """The names of all models, also of those without versions, and what tells them from models of the same name.

        A model in another registry, or one that was registered again, has another identity.
        """
        rows = await self._mlflow.search("registered-models/search", "registered_models")
        return {row["name"]: f"{row['name']}@{row['creation_timestamp']}" for row in rows}

    async def versions(self, condition: str = "", *, skip_damaged: bool = True) -> list[Version]:
        """All versions of Forgearr's that meet a condition, newest first."""
        rows = await self._version_rows(condition)
        return list(readable_versions(rows)) if skip_damaged else [version_of_row(row) for row in rows]

    async def find(self, reference: str) -> Version:
        """The version NAME:v3, or the served one for NAME and NAME:latest."""
        name, number = parse_reference(reference)
        if number is not None:
            return version_of_row(await self._version_row(name, number))
        try:
            response = await self._mlflow.call(
                "GET", "registered-models/alias", params={"name": name, "alias": SERVED_ALIAS}
            )
        except MlflowRefused as refusal:
            # MLflow returns 404 if there is no such model, and 400 if the model has no such alias.
            if refusal.details.get("status") not in {400, 404}:
                raise
            raise unknown_version(reference) from refusal
        if not is_ours(response["model_version"]):
            raise ModelNotFound(f"The model '{name}' in MLflow was not registered by Forgearr.")
        return version_of_row(response["model_version"])

    async def find_export(self, export_job_id: str) -> Version:
        """The version that an export job has made."""
        condition = f"tags.`forgearr.export_job_id` = '{export_job_id}'"
        versions = await self.versions(condition) if JOB_ID_PATTERN.fullmatch(export_job_id) else []
        if not versions:
            raise ModelNotFound(f"There is no model version of an export job '{export_job_id}'.")
        return versions[-1]

    async def adapters_of(self, base: str) -> list[Version]:
        """The versions that are adapters on this base, newest first."""
        versions = await self.versions(f"tags.`forgearr.base_model` = '{base}'") if "'" not in base else []
        return sorted((one for one in versions if one.is_adapter), key=lambda one: one.created_at, reverse=True)

    async def models(self) -> list[Model]:
        """All models that have a version of Forgearr's, sorted by name."""
        rows = await self._mlflow.search("registered-models/search", "registered_models")
        versions: dict[str, list[Version]] = {}
        for version in await self.versions():
            versions.setdefault(version.name, []).append(version)
        return [
            new_model(versions[row["name"]], served_number(row))
            for row in sorted(rows, key=lambda row: row["name"])
            if row["name"] in versions
        ]

    async def model(self, name: str) -> Model:
        served = served_number(await self._model_row(name))
        versions = await self.versions(f"name = '{name}'")
        if not versions:
            raise unknown_model(name)
        return new_model(versions, served)

    async def set_served(self, name: str, number: int) -> int | None:
        """Serve this version from now on. Returns the number of the version that was served before, if any."""
        row = await self._model_row(name)
        await self._version_row(name, number)
        served = served_number(row)
        if served == number:
            return (served_history(row) or [None])[-1]
        if served is not None:
            # The history first: if the process ends in between, an entry that equals the served version is ignored.
            await self._save_history(name, [*served_history(row), served])
        await self._set_served_alias(name, number)
        return served

    async def roll_back(self, name: str) -> tuple[Version, int]:
        """Serve the previously served version. Returns it, and the number of the version that it replaces."""
        row = await self._model_row(name)
        served, history = served_number(row), served_history(row)
        known = {version.number: version for version in await self.versions(f"name = '{name}'")}
        earlier = [number for number in history if number in known]
        if served is None or not earlier:
            raise NoEarlierVersion(f"No existing version of '{name}' was served before the current one.")
        await self._set_served_alias(name, earlier[-1])
        await self._save_history(name, earlier[:-1])
        return known[earlier[-1]], served

    async def set_validation(
        self,
        name: str,
        number: int,
        passed: bool,
        reasons: Sequence[str] = (),
        validation: Mapping[str, Any] | None = None,
    ) -> None:
        """Record whether a version has passed its validation, the reasons if not, its gates and their metrics."""
        for key, value in (("validation", validation), ("reasons", list(reasons)), ("passed", passed)):
            await self._set_tag(name, number, key, json.dumps(value))

    async def retire(self, name: str) -> Version:
        """Serve no version of a model any more. Returns the one that was served."""
        row = await self._model_row(name)
        version = await self.find(name)
        # The history first, as in a switch.
        await self._save_history(name, [*served_history(row), version.number])
        await self._mlflow.call("DELETE", "registered-models/alias", json={"name": name, "alias": SERVED_ALIAS})
        return version

    async def save_comparison(self, name: str, number: int, comparison: Mapping[str, Any]) -> None:
        """Record the comparison of a version with the one that was served."""
        await self._set_tag(name, number, "comparison", json.dumps(comparison))

    async def set_visibility(self, name: str, number: int, visibility: Visibility) -> None:
        """Change who sees a version that is not served."""
        await self._require_not_served(name, [number])
        await self._set_tag(name, number, "visibility", visibility)

    async def fetch(
        self, version: Version, file: ModelFile | None = None, on_progress: OnProgress = lambda done, total: None
    ) -> Path:
        """The cached copy of a version's file, to be read only. Without `file`, of the one that is served."""
        chosen_file = file or version.file

        async def download(target: Path) -> str:
            row = await self._version_row(version.name, version.number)
            if row["source"] == BLOB_SOURCE:
                return await asyncio.to_thread(blobs.copy_to, chosen_file.sha256, target)
            address = f"{row['source']}/{chosen_file.name}"
            return await self._mlflow.download(address, target, lambda done: on_progress(done, chosen_file.bytes))

        return await model_cache.get_or_download(chosen_file.sha256, chosen_file.bytes, download)

    async def delete_model(self, name: str) -> None:
        """Delete all versions of a model and their files."""
        await self.delete_versions(name, [version.number for version in (await self.model(name)).versions])

    async def delete_versions(self, name: str, numbers: Sequence[int]) -> None:
        """Delete versions and their files, none of which is served or needed by others.

        The name stays in MLflow with its counter, so that NAME:v3 never comes to mean another version.
        """
        rows = [await self._version_row(name, number) for number in numbers]
        await self._require_not_served(name, numbers)
        await self._require_unused([f"{name}:v{number}" for number in numbers])
        for row in rows:
            await self._delete_version(row)

    async def _require_not_served(self, name: str, numbers: Sequence[int]) -> None:
        served = served_number(await self._model_row(name))
        if served in numbers:
            raise VersionServed(
                f"{name}:v{served} is served: deploy another version, roll back, or retire the model "
                f"(`forgearr retire {name}`) first."
            )

    async def _require_unused(self, references: Sequence[str]) -> None:
        for reference in references:
            if adapters := [one for one in await self.adapters_of(reference) if one.reference not in references]:
                raise VersionInUse(f"{reference} cannot be deleted: {adapters[0].reference} is an adapter for it.")

    async def _ensure_model(self, name: str, principal: Principal) -> None:
        """Create the name if it is new. It then belongs to the principal: of two who create it, MLflow lets one."""
        if not await self._mlflow.call("GET", "registered-models/get", default={}, params={"name": name}):
            body = {"name": name, "tags": maker_tags(principal)}
            with suppress(MlflowRefused):  # another export has just created it
                await self._mlflow.call("POST", "registered-models/create", json=body)
        require_maker(await self._model_row(name), principal)

    async def _find_by_export(self, name: str, export_job_id: str) -> list[Version]:
        return await self.versions(f"name = '{name}' AND tags.`forgearr.export_job_id` = '{export_job_id}'")

    async def _merge_export_versions(self, name: str, export_job_id: str) -> Version:
        """The version of an export. A replaced worker and its successor may have made two: keep the first."""
        *later, first = await self._find_by_export(name, export_job_id)
        for version in later:
            key = version_key(name, version.number)
            await self._mlflow.call("DELETE", "model-versions/delete", default={}, json=key)
        return first

    async def _model_row(self, name: str) -> dict[str, Any]:
        found = await self._mlflow.call("GET", "registered-models/get", default={}, params={"name": name})
        if not found:
            raise unknown_model(name)
        return found["registered_model"]

    async def _version_row(self, name: str, number: int) -> dict[str, Any]:
        found = await self._mlflow.call("GET", "model-versions/get", default={}, params=version_key(name, number))
        if not found or not is_ours(found["model_version"]):
            raise unknown_version(f"{name}:v{number}")
        return found["model_version"]

    async def _version_rows(self, condition: str = "") -> list[dict[str, Any]]:
        """All rows of Forgearr's that meet a condition, newest first."""
        rows = await self._mlflow.search("model-versions/search", "model_versions", condition)
        return sorted((row for row in rows if is_ours(row)), key=lambda row: -int(row["version"]))

    async def _set_served_alias(self, name: str, number: int) -> None:
        # Everybody sees the version before it is NAME:latest.
        await self._set_tag(name, number, "visibility", "served")
        await self._mlflow.call(
            "POST", "registered-models/alias", json={**version_key(name, number), "alias": SERVED_ALIAS}
        )

    async def _save_history(self, name: str, history: list[int]) -> None:
        body = {"name": name, "key": "forgearr.history", "value": json.dumps(history[-MAX_HISTORY:])}
        await self._mlflow.call("POST", "registered-models/set-tag", json=body)

    async def _set_tag(self, name: str, number: int, key: str, value: str) -> None:
        body = {**version_key(name, number), "key": f"forgearr.{key}", "value": value}
        await self._mlflow.call("POST", "model-versions/set-tag", json=body)

    async def _create_version(
        self, name: str, source: str, run_id: str, tags: Mapping[str, str], description: str
    ) -> Version:
        body = {
            "name": name,
            "source": source,
            "run_id": run_id,
            "tags": [{"key": f"forgearr.{key}", "value": value} for key, value in tags.items()],
            "description": description,
        }
        return version_of_row((await self._mlflow.call("POST", "model-versions/create", json=body))["model_version"])

    async def _require_or_delete(self, version: Version, reference: str) -> None:
        """Delete a new version again, and raise, if the one that it depends on was deleted meanwhile."""
        if reference == tiny.NAME:
            return
        try:
            await self.find(reference)
        except ModelNotFound:
            await self._delete_version(await self._version_row(version.name, version.number))
            raise

    async def _delete_version(self, row: dict[str, Any]) -> None:
        """Delete a version, and its files unless a copy has them too. Blobs are left to the sweep."""
        await self._mlflow.call("DELETE", "model-versions/delete", json=version_key(row["name"], int(row["version"])))
        if row["source"] != BLOB_SOURCE and not await self._version_rows(f"source_path = '{row['source']}'"):
            await self._mlflow.delete_artifacts(row["source"])


@asynccontextmanager
async def connect() -> AsyncGenerator[Registry]:
    """Connect to the registry of this installation."""
    uri = get_settings().mlflow_uri
    if uri is None:
        raise RegistryDisabled
    async with mlflow_client.connect(uri) as mlflow:
        yield Registry(mlflow)
