"""Convert between MLflow's registered models, which hold our facts as tags, and the classes of versions.py."""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, cast

from cluster.ownership import Principal
from cluster.settings import get_settings
from pipelines.training.models.versions import (
    SERVED_ALIAS,
    Model,
    ModelDefaults,
    ModelFile,
    ModelNameTaken,
    Version,
    VersionDamaged,
    Visibility,
)

log = logging.getLogger(__name__)

BLOB_SOURCE = "forgearr:/blobs"
"""The `source` in MLflow of a version whose files are blobs in storage, and not artifacts of MLflow."""
MAX_HISTORY = 100
MAKER_TAG = "forgearr.maker"
"""The tag of a name with the id of the account that registered it first."""


def version_tags(files: Sequence[ModelFile], adapter: ModelFile | None, base_model: str) -> dict[str, str]:
    return {
        "files": json.dumps([asdict(file) for file in files]),
        "adapter": json.dumps(asdict(adapter) if adapter else None),
        "base_model": base_model,
        "job_id": "",
        "export_job_id": "",
    }


def defaults_as_tags(defaults: ModelDefaults) -> dict[str, str]:
    return {"manner": json.dumps(asdict(defaults))} if defaults != ModelDefaults() else {}


def version_key(name: str, number: int) -> dict[str, str]:
    return {"name": name, "version": str(number)}


def version_description(base_model: str, job_id: str, export_job_id: str) -> str:
    """The description that MLflow's pages show of a version, with links to its jobs."""
    jobs = f"{get_settings().url}/api/v1/jobs"
    training_link, export_link = (f"[{job}]({jobs}/{job})" for job in (job_id, export_job_id))
    return f"Made from `{base_model}` by {training_link}, exported by {export_link}."


def is_ours(row: dict[str, Any]) -> bool:
    return any(tag["key"] == "forgearr.files" for tag in row.get("tags", []))


def version_of_row(row: dict[str, Any]) -> Version:
    try:
        return _parse_version(row)
    except (KeyError, TypeError, ValueError) as error:
        raise VersionDamaged(
            f"The tags of {row.get('name')}:v{row.get('version')} in MLflow have been changed, and cannot be read: "
            f"{type(error).__name__}: {error}."
        ) from error


def readable_versions(rows: Iterable[dict[str, Any]]) -> Iterator[Version]:
    """Yield the versions of these rows. One that cannot be read is left out, so that it hides no other."""
    for row in rows:
        try:
            yield version_of_row(row)
        except VersionDamaged as error:
            log.warning("%s It is left out.", error.message)


def _parse_version(row: dict[str, Any]) -> Version:
    tags = {tag["key"].removeprefix("forgearr."): tag.get("value", "") for tag in row["tags"]}
    adapter = json.loads(tags["adapter"])
    owner_id = tags.get("owner_id") or None
    return Version(
        name=row["name"],
        number=int(row["version"]),
        run_id=row.get("run_id", ""),
        files=[ModelFile(**file) for file in json.loads(tags["files"])],
        adapter=ModelFile(**adapter) if adapter else None,
        base_model=tags["base_model"],
        job_id=tags["job_id"],
        export_job_id=tags["export_job_id"],
        passed=json.loads(tags["passed"]) if "passed" in tags else None,
        reasons=json.loads(tags.get("reasons", "[]")),
        validation=json.loads(tags.get("validation", "null")),
        defaults=ModelDefaults(**json.loads(tags.get("manner", "{}"))),
        owner_id=owner_id,
        visibility=cast(Visibility, tags.get("visibility") or ("private" if owner_id else "shared")),
        parent=tags.get("parent", ""),
        comparison=json.loads(tags.get("comparison", "null")),
        created_at=datetime.fromtimestamp(int(row["creation_timestamp"]) / 1000, UTC),
    )


def maker_tags(principal: Principal) -> list[dict[str, str]]:
    """The tags of a new name. Empty: it belongs to administrators."""
    return [{"key": MAKER_TAG, "value": principal.id or ""}]


def require_maker(row: dict[str, Any], principal: Principal) -> None:
    """Raise ModelNameTaken unless the name is the principal's."""
    makers = [tag.get("value") for tag in row.get("tags", []) if tag["key"] == MAKER_TAG]
    if not principal.is_admin and principal.id not in makers:
        raise ModelNameTaken(
            f"The model name '{row['name']}' belongs to another account, or to administrators. Choose another name."
        )


def new_model(versions: list[Version], served: int | None) -> Model:
    return Model(
        name=versions[0].name,
        served=next((version for version in versions if version.number == served), None),
        versions=versions,
    )


def served_number(row: dict[str, Any]) -> int | None:
    return next((int(alias["version"]) for alias in row.get("aliases", []) if alias["alias"] == SERVED_ALIAS), None)


def served_history(row: dict[str, Any]) -> list[int]:
    """The numbers of the versions that were served before the current one, the latest last."""
    tags = {tag["key"]: tag["value"] for tag in row.get("tags", [])}
    history: list[int] = json.loads(tags.get("forgearr.history", "[]"))
    while history and history[-1] == served_number(row):
        history.pop()
    return history
