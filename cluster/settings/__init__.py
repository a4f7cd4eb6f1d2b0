"""All settings: their sections, their sources, and how they are shown."""

from cluster.settings.backup import MIN_PASSPHRASE_LENGTH, BackupSettings
from cluster.settings.base import LOOPBACK, Rate, Section, home
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
from cluster.settings.jobs import JobSettings
from cluster.settings.loader import (
    DEFAULTS,
    ENVIRONMENT_PREFIX,
    NODE_SECRETS_VARIABLE,
    NODE_VERSION_VARIABLE,
    RESERVED_VARIABLES,
    LoadedSettings,
    export_overrides,
    get_settings,
    load_settings,
    node_environment,
)
from cluster.settings.masking import SECRET_NAMES, mask_url
from cluster.settings.media import AuditSettings, MediaSettings, RecoverySettings
from cluster.settings.monitoring import DeclaredServer, ServerSettings
from cluster.settings.root import Settings
from cluster.settings.server import MIN_KEY_LENGTH, PLACEHOLDERS, AuthSettings, LimitSettings, ServeSettings
from cluster.settings.services import DeclaredService, ServiceSettings
from cluster.settings.training import ForgeSettings, GateSettings

__all__ = [
    "DEFAULTS",
    "ENVIRONMENT_PREFIX",
    "LOOPBACK",
    "MIN_KEY_LENGTH",
    "MIN_PASSPHRASE_LENGTH",
    "NODE_SECRETS_VARIABLE",
    "NODE_VERSION_VARIABLE",
    "PLACEHOLDERS",
    "RESERVED_VARIABLES",
    "SECRET_NAMES",
    "AuditSettings",
    "AuthSettings",
    "BackupSettings",
    "DatabaseSettings",
    "DeclaredServer",
    "DeclaredService",
    "EngineSettings",
    "FileSettings",
    "ForgeSettings",
    "GateSettings",
    "GuardianSettings",
    "JobSettings",
    "LimitSettings",
    "LoadedSettings",
    "LogSettings",
    "MediaSettings",
    "MlflowSettings",
    "OllamaSettings",
    "Rate",
    "RaySettings",
    "RecoverySettings",
    "Section",
    "ServeSettings",
    "ServerSettings",
    "ServiceSettings",
    "Settings",
    "StorageSettings",
    "export_overrides",
    "get_settings",
    "home",
    "load_settings",
    "mask_url",
    "node_environment",
]
