"""The routes /api/v1/models: the registered models, and which of their versions is served as NAME:latest."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Request
from pydantic import BaseModel, ConfigDict, Field

from cluster import audit_log
from cluster.times import UtcTime
from jobs.queue import JobRequest
from pipelines.training.deploy import job as deploy_job
from pipelines.training.deploy.job import VersionNotPassed
from pipelines.training.models import access, registry
from pipelines.training.models.versions import Model, Version, Visibility
from pipelines.training.spec import ModelName
from serve.http.pagination import Page, PaginationParams
from serve.jobs.routes import JobView, create_job
from serve.models.dependencies import get_models
from serve.security.callers import AdminCaller, CurrentCaller

router = APIRouter(prefix="/api/v1/models")

VersionNumber = Annotated[int, Path(ge=1, lt=10**9)]


class FileView(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    name: str
    quantization: str
    sha256: str
    bytes: int


class VersionView(BaseModel):
    name: str
    version: int
    model_name: str = Field(examples=["homelab:v3"])
    served: bool = Field(description="Whether it is NAME:latest.")
    visibility: Visibility = Field(
        description="Who sees it. private: its owner and administrators. shared: everybody. served: everybody, because "
        "it was served once."
    )
    owner_id: str | None = Field(description="The account that trained it. Null: an administrator's or the platform.")
    passed: bool | None = Field(description="Whether it passed its validation. Null: it was never validated.")
    reasons: list[str] = Field(description="Why it did not pass its validation.")
    validation: dict[str, Any] | None = Field(
        description="The gates of its validation, and the metrics that they look at. Null: it was never validated."
    )
    comparison: dict[str, Any] | None = Field(
        description="Comparison with the version that was served before. Null: it was not compared."
    )
    files: list[FileView] = Field(description="The first file is served. If there is none, the adapter is.")
    adapter: FileView | None
    base_model: str
    parent: str | None = Field(description="The version from which it was copied. Null: it has files of its own.")
    job_id: str | None = Field(description="The job that trained it. Null: it was created from files.")
    export_job_id: str | None
    mlflow_run_id: str | None
    created_at: UtcTime


class ModelView(BaseModel):
    name: str
    served_version: int | None = Field(description="The version that is NAME:latest. Null: none yet.")
    versions: list[VersionView] = Field(description="The newest first.")


class DeployRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: int = Field(ge=1, lt=10**9)
    force: bool = Field(
        default=False, description="Deploy even if it did not pass its validation, or was never validated."
    )


class VersionChanges(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    visibility: Literal["private", "shared"]


class RollbackResult(BaseModel):
    name: str
    version: int = Field(description="The version that is served now.")
    previous: int = Field(description="The version that was served until now.")
    warning: str | None = Field(
        description="Set if the version does not pass the gates, or if the Ollama server could not be updated."
    )


class RetireResult(BaseModel):
    name: str
    version: int = Field(description="The version that was served until now.")
    warning: str | None = Field(description="Set if the Ollama server could not be updated.")


@router.get("")
async def list_models(caller: CurrentCaller, paging: PaginationParams) -> Page[ModelView]:
    """List the models by name, with their versions. Of private versions only your own are listed."""
    async with registry.connect() as models:
        found = paging.cut(access.visible_models(await models.models(), caller))
    return paging.page([_view(model) for model in found.items], found.total)


@router.get("/{name}")
async def show_model(name: ModelName, caller: CurrentCaller) -> ModelView:
    """Get a model with its versions."""
    async with registry.connect() as models:
        return _view(access.visible_model(await models.model(name), caller))


@router.post("/{name}/deploy", status_code=201)
async def deploy_model(
    name: ModelName,
    body: DeployRequest,
    caller: AdminCaller,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
) -> JobView:
    """Queue a job that serves a version as NAME:latest. No request is dropped meanwhile."""
    async with registry.connect() as models:
        version = await models.find(f"{name}:v{body.version}")
    try:
        deploy_job.require_validated(version, body.force)
    except VersionNotPassed as error:
        await audit_log.record_alone("model.deploy", caller, version.reference, outcome="refused", reason=error.message)
        raise
    job_request = JobRequest(kind="deploy", spec={"name": name, **body.model_dump()})
    return await create_job(job_request, caller, idempotency_key)


@router.post("/{name}/rollback")
async def roll_back_model(name: ModelName, caller: AdminCaller) -> RollbackResult:
    """Serve the version before the present one again, at once."""
    version, replaced, warning = await deploy_job.roll_back(name)
    await audit_log.record_alone("model.rollback", caller, version.reference, previous=replaced)
    return RollbackResult(name=name, version=version.number, previous=replaced, warning=warning)


@router.post("/{name}/retire")
async def retire_model(name: ModelName, caller: AdminCaller, request: Request) -> RetireResult:
    """Serve no version of a model any more, at once. Its versions stay."""
    version, warning = await deploy_job.retire(name)
    await audit_log.record_alone("model.retire", caller, version.reference)
    get_models(request).clear_cache()
    return RetireResult(name=name, version=version.number, warning=warning)


@router.patch("/{name}/versions/{version}")
async def change_version(
    name: ModelName, version: VersionNumber, body: VersionChanges, caller: CurrentCaller, request: Request
) -> VersionView:
    """Share a version with everybody, or make it private again: your own, or any for administrators."""
    changed = await access.set_visibility(f"{name}:v{version}", body.visibility, caller)
    get_models(request).clear_cache()
    return _version_view(changed, served=False)


@router.delete("/{name}", status_code=204)
async def delete_model(name: ModelName, caller: AdminCaller) -> None:
    """Delete a model that is not served: all its versions and their files. Their numbers are not reused."""
    async with registry.connect() as models:
        await models.delete_model(name)
    await audit_log.record_alone("model.delete", caller, name)


@router.delete("/{name}/versions/{version}", status_code=204)
async def delete_version(name: ModelName, version: VersionNumber, caller: AdminCaller) -> None:
    """Delete a version that is not served, and its files. Its number is not reused."""
    async with registry.connect() as models:
        await models.delete_versions(name, [version])
    await audit_log.record_alone("model.delete", caller, f"{name}:v{version}")


def _view(model: Model) -> ModelView:
    served = model.served.number if model.served else None
    versions = [_version_view(version, version.number == served) for version in model.versions]
    return ModelView(name=model.name, served_version=served, versions=versions)


def _version_view(version: Version, served: bool) -> VersionView:
    copied_fields = ("name", "passed", "reasons", "validation", "comparison")
    copied_fields += ("files", "adapter", "base_model", "created_at", "visibility", "owner_id")
    return VersionView(
        **{name: getattr(version, name) for name in copied_fields},
        version=version.number,
        model_name=version.reference,
        served=served,
        parent=version.parent or None,
        job_id=version.job_id or None,
        export_job_id=version.export_job_id or None,
        mlflow_run_id=version.run_id or None,
    )
