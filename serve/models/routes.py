"""/api/v1/models: the registry of models, and which version of each is served as NAME:latest."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Path
from pydantic import BaseModel, ConfigDict, Field

from cluster.times import UtcTime
from jobs.queue import JobRequest
from pipelines.training.deploy import job as deploy_job
from pipelines.training.models import registry
from pipelines.training.models.versions import Model, Version
from pipelines.training.spec import ModelName
from serve.http.errors import ERROR_RESPONSES
from serve.http.pagination import Page, PaginationParams
from serve.jobs.routes import JobView, create_job
from serve.security.callers import AdminCaller, CurrentCaller

router = APIRouter(prefix="/api/v1/models", tags=["Models"], responses=ERROR_RESPONSES)

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
    served: bool = Field(description="Whether it is what NAME:latest means.")
    passed: bool | None = Field(description="Whether it passed its validation. Null: it was never validated.")
    reasons: list[str] = Field(description="Why it did not pass.")
    comparison: dict[str, Any] | None = Field(
        description="How it did beside the version that was served when it was made. Null: it was not compared."
    )
    files: list[FileView] = Field(description="The first one is served. None: the adapter is.")
    adapter: FileView | None
    base_model: str
    parent: str | None = Field(description="The version that it has its files from. Null: they are its own.")
    job_id: str | None = Field(description="The fine-tune that made it. Null: it was made from files.")
    export_job_id: str | None
    mlflow_run_id: str | None
    created_at: UtcTime


class ModelView(BaseModel):
    name: str
    served_version: int | None = Field(description="What NAME:latest means. Null: nothing yet.")
    versions: list[VersionView] = Field(description="Newest first.")


class DeployRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: int = Field(ge=1, lt=10**9)
    force: bool = Field(default=False, description="Even when it did not pass its validation, or was never validated.")


class RollbackResult(BaseModel):
    name: str
    version: int = Field(description="What is served now.")
    previous: int = Field(description="What was served until now.")
    warning: str | None = Field(description="What is left to do: the Ollama server could not be told.")


@router.get("")
async def list_models(caller: CurrentCaller, paging: PaginationParams) -> Page[ModelView]:
    """Models by name, with all their versions."""
    async with registry.connect() as models:
        all_models = await models.models()
    page = all_models[paging.skip : paging.skip + paging.limit]
    return paging.page([_view(model) for model in page], len(all_models))


@router.get("/{name}")
async def show_model(name: ModelName, caller: CurrentCaller) -> ModelView:
    """A model with all its versions."""
    async with registry.connect() as models:
        return _view(await models.model(name))


@router.post("/{name}/deploy", status_code=201)
async def deploy_model(
    name: ModelName,
    body: DeployRequest,
    caller: AdminCaller,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
) -> JobView:
    """Serve a version as NAME:latest. Answers with the job that does it; no request is dropped meanwhile."""
    async with registry.connect() as models:
        deploy_job.require_validated(await models.find(f"{name}:v{body.version}"), body.force)
    job_request = JobRequest(kind="deploy", spec={"name": name, **body.model_dump()})
    return await create_job(job_request, caller, idempotency_key)


@router.post("/{name}/rollback")
async def roll_back_model(name: ModelName, caller: AdminCaller) -> RollbackResult:
    """Serve, at once, the version that was served before this one."""
    version, replaced, warning = await deploy_job.roll_back(name)
    return RollbackResult(name=name, version=version.number, previous=replaced, warning=warning)


@router.delete("/{name}", status_code=204)
async def delete_model(name: ModelName, caller: AdminCaller) -> None:
    """Delete all versions of a model with their files, the one that is served too. Their numbers are not used again."""
    async with registry.connect() as models:
        await models.delete_model(name)


@router.delete("/{name}/versions/{version}", status_code=204)
async def delete_version(name: ModelName, version: VersionNumber, caller: AdminCaller) -> None:
    """Delete a version that is not served, with its files. Its number is not used again."""
    async with registry.connect() as models:
        await models.delete_version(name, version)


def _view(model: Model) -> ModelView:
    served = model.served.number if model.served else None
    versions = [_version_view(version, version.number == served) for version in model.versions]
    return ModelView(name=model.name, served_version=served, versions=versions)


def _version_view(version: Version, served: bool) -> VersionView:
    copied_fields = ("name", "passed", "reasons", "comparison", "files", "adapter", "base_model", "created_at")
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
