"""Settings of the database, storage, uploaded files, Ray, MLflow and logs."""

import re
from typing import Literal

from pydantic import Field, SecretStr, field_validator

from cluster.settings.base import Section

BUCKET_ADDRESS = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w.=-]+)*/?")


class DatabaseSettings(Section):
    url: SecretStr | None = Field(description="postgresql://user:password@host/name. Null: SQLite in FORGEARR_HOME.")
    pool_size: int = Field(ge=1, le=100, description="Connections to PostgreSQL that one process keeps open.")


class StorageSettings(Section):
    url: str | None = Field(
        description="Where files are stored: a folder that all nodes share, or s3://bucket/prefix (with "
        "forgearr[s3], and credentials from the environment). Null: a folder in FORGEARR_HOME."
    )
    min_free_mb: int = Field(
        ge=0,
        description="Space that stays free on the disks of this machine, in MiB. Requests and exports that would take "
        "it are refused.",
    )

    @field_validator("url")
    @classmethod
    def refuse_credentials(cls, url: str | None) -> str | None:
        scheme, separator, address = (url or "").partition("://")
        if separator and scheme == "s3" and not BUCKET_ADDRESS.fullmatch(address):
            raise ValueError("must be s3://bucket/prefix, without credentials: those come from the environment")
        return url


class FileSettings(Section):
    max_mb: int = Field(ge=1, le=1_048_576, description="Maximum size of a file that is sent in one request, in MiB.")
    max_upload_mb: int = Field(ge=1, le=1_048_576, description="Maximum size of a file that is sent in parts, in MiB.")


class RaySettings(Section):
    address: str | None = Field(
        pattern=r"^[^\s:/]+:\d{1,5}$",
        description="Address of a Ray cluster to join (host:port). Null: start one on this machine.",
    )
    namespace: str | None = Field(
        pattern=r"^[a-z0-9-]{1,60}$",
        description="Name of this installation's actors and application on the Ray cluster. Null: forgearr on a "
        "cluster of its own; on a cluster that it joins, a name that follows from the address of the database.",
    )
    port: int = Field(ge=1, le=65535, description="Port of the Ray head that is started on this machine.")
    dashboard_port: int = Field(ge=1, le=65535, description="Port of Ray's dashboard and of `ray job submit`.")
    cpus: int | None = Field(ge=1, description="CPUs that jobs may use on this machine. Null: all.")
    gpus: int | None = Field(ge=0, description="GPUs that jobs may use on this machine. Null: all.")
    object_store_mb: int = Field(ge=80, description="Shared memory of Ray's object store, in MB.")


class MlflowSettings(Section):
    enabled: bool = Field(description="Whether tracked jobs are recorded in MLflow.")
    tracking_uri: SecretStr | None = Field(
        description="An MLflow server to use (http://…, or https://user:password@…). Null: start one on this machine."
    )
    port: int = Field(ge=1, le=65535, description="Port of the MLflow server that is started on this machine.")


class LogSettings(Section):
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(description="Lowest level that is written.")
    audit_log_days: float = Field(gt=0, description="How long entries of the audit log are kept.")
    rotate_mb: int = Field(ge=1, description="Size at which a log file is rotated, in MB.")
