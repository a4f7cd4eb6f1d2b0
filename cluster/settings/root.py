"""The settings of an installation: all sections, and values that are derived from more than one of them."""

from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from cluster.settings.backup import BackupSettings
from cluster.settings.base import Section, home
from cluster.settings.engines import EngineSettings, OllamaSettings
from cluster.settings.guardian import GuardianSettings
from cluster.settings.infrastructure import (
    DatabaseSettings,
    FileSettings,
    LogSettings,
    MlflowSettings,
    RaySettings,
    StorageSettings,
)
from cluster.settings.jobs import JobSettings, RetentionSettings
from cluster.settings.media import AuditSettings, MediaSettings, RecoverySettings
from cluster.settings.monitoring import ServerSettings
from cluster.settings.server import AuthSettings, LimitSettings, ServeSettings
from cluster.settings.services import ServiceSettings
from cluster.settings.training import ForgeSettings, GateSettings


class Settings(Section):
    serve: ServeSettings
    auth: AuthSettings
    limits: LimitSettings
    database: DatabaseSettings
    storage: StorageSettings
    files: FileSettings
    ray: RaySettings
    mlflow: MlflowSettings
    jobs: JobSettings
    retention: RetentionSettings
    forge: ForgeSettings
    gates: GateSettings
    engines: EngineSettings
    ollama: OllamaSettings
    guardian: GuardianSettings
    services: ServiceSettings
    servers: ServerSettings
    media: MediaSettings
    recovery: RecoverySettings
    audit: AuditSettings
    logs: LogSettings
    backup: BackupSettings

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the gateway. On a cluster of others, Serve listens where they chose."""
        return self.serve.is_loopback and self.ray.address is None

    @property
    def auth_required(self) -> bool:
        return not self.is_local if self.auth.required is None else self.auth.required

    @property
    def registration_open(self) -> bool:
        return not self.auth_required if self.auth.registration is None else self.auth.registration

    @property
    def limits_enabled(self) -> bool:
        return self.auth_required if self.limits.enabled is None else self.limits.enabled

    @property
    def database_url(self) -> str:
        if self.database.url is None:
            return f"sqlite+aiosqlite:///{home() / 'forgearr.db'}"
        return self.database.url.get_secret_value().replace("postgresql://", "postgresql+asyncpg://", 1)

    @property
    def ray_namespace(self) -> str:
        """Two installations on one cluster must not take each other's actors."""
        if self.ray.namespace is not None or self.ray.address is None:
            return self.ray.namespace or "forgearr"
        url = urlsplit(self.database_url)
        address = url.netloc.rpartition("@")[2] + url.path
        return f"forgearr-{sha256(address.encode()).hexdigest()[:10]}"

    @property
    def storage_url(self) -> str:
        return self.storage.url or str(home() / "storage")

    @property
    def has_own_mlflow(self) -> bool:
        """Whether `forgearr up` starts MLflow. Else there is none, or it is a server of others."""
        return self.mlflow.enabled and self.mlflow.tracking_uri is None

    @property
    def mlflow_uri(self) -> str | None:
        """The URL of MLflow. That of another server may contain credentials: show it with `mask_url`."""
        if not self.mlflow.enabled:
            return None
        if self.mlflow.tracking_uri is None:
            return f"http://127.0.0.1:{self.mlflow.port}"
        return self.mlflow.tracking_uri.get_secret_value()

    @property
    def backup_folder(self) -> Path:
        return Path(self.backup.folder).expanduser() if self.backup.folder else home() / "backups"

    @property
    def url(self) -> str:
        """The URL of the gateway for clients on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(self.serve.host, self.serve.host)  # noqa: S104
        return f"http://{host}:{self.serve.port}"
