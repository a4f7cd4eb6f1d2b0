"""The requests and responses of /v1/files and /v1/uploads."""

from typing import Any, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import FormData, UploadFile

from cluster.files.tables import MAX_FILENAME_LENGTH, File, Upload
from serve.http.schemas import StrictModel

Purpose = Literal["fine-tune", "batch", "user_data"]
"""OpenAI's other purposes are for features that Forgearr does not have: assistants, vision and evals."""
DAY_SECONDS = 24 * 3600
BATCH_DAYS = 30


class ExpiresAfter(StrictModel):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=BATCH_DAYS * DAY_SECONDS)


class FileFields(StrictModel):
    """The fields of an upload form, besides the content."""

    purpose: Purpose
    filename: str = Field(min_length=1, max_length=MAX_FILENAME_LENGTH, pattern=r"^[^\x00]*$")
    expires_after: ExpiresAfter | None = None

    @property
    def seconds(self) -> int | None:
        return lifetime_seconds(self.purpose, self.expires_after)


class UploadRequest(StrictModel):
    purpose: Purpose
    filename: str = Field(min_length=1, max_length=MAX_FILENAME_LENGTH)
    bytes: int = Field(ge=1, le=2**53, description="Total size of all parts.")
    mime_type: str = Field(max_length=200, description="Not used.")
    expires_after: ExpiresAfter | None = None

    @property
    def seconds(self) -> int | None:
        return lifetime_seconds(self.purpose, self.expires_after)


class CompleteUploadRequest(StrictModel):
    part_ids: list[str] = Field(min_length=1, max_length=10_000, description="In the order of the file.")
    md5: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{32}$", description="Of the whole file.")


class FileObject(BaseModel):
    id: str = Field(examples=["file-3f0c"])
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = Field(description="Null: never.")
    filename: str
    purpose: str
    status: Literal["processed", "error"]
    status_details: str | None = Field(description="With status error: the invalid line, and the reason.")


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class UploadObject(BaseModel):
    id: str = Field(examples=["upload_3f0c"])
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None = None


class PartObject(BaseModel):
    id: str = Field(examples=["part_3f0c"])
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


def lifetime_seconds(purpose: str, expires_after: ExpiresAfter | None) -> int | None:
    """Seconds until a file is deleted; None: it never is."""
    if expires_after is not None:
        return expires_after.seconds
    return BATCH_DAYS * DAY_SECONDS if purpose == "batch" else None


def file_fields(form: FormData) -> tuple[FileFields, UploadFile]:
    """Parse an upload form. Unknown fields are errors."""
    file = only_file(form, "file")
    values: dict[str, Any] = {"filename": file.filename}
    for name, value in form.multi_items():
        if name.startswith("expires_after[") and name.endswith("]"):
            values.setdefault("expires_after", {})[name.removeprefix("expires_after[").removesuffix("]")] = value
        elif name != "file":
            values[name] = value
    try:
        return FileFields.model_validate(values), file
    except ValidationError as error:
        issues = error.errors(include_url=False)
        raise RequestValidationError([{**issue, "loc": ("body", *issue["loc"])} for issue in issues]) from None


def only_file(form: FormData, name: str) -> UploadFile:
    file = form.get(name)
    if isinstance(file, UploadFile):
        return file
    missing = {"type": "missing", "loc": ("body", name), "msg": "a file is required, with its filename"}
    raise RequestValidationError([missing])


def file_object(file: File) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created_at.timestamp()),
        expires_at=int(file.expires_at.timestamp()) if file.expires_at else None,
        filename=file.filename,
        purpose=file.purpose,
        status="error" if file.fault else "processed",
        status_details=file.fault,
    )


def upload_object(upload: Upload, file: File | None = None) -> UploadObject:
    return UploadObject(
        id=upload.id,
        bytes=upload.bytes,
        created_at=int(upload.created_at.timestamp()),
        expires_at=int(upload.expires_at.timestamp()),
        filename=upload.filename,
        purpose=upload.purpose,
        status=upload.status,
        file=file_object(file) if file else None,
    )
