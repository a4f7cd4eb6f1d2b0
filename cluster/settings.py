"""The one settings object, and where each of its values came from.

Four layers, the later one wins: configs/forgearr.yaml (which holds every default), $FORGEARR_HOME/forgearr.yaml, the
environment (FORGEARR_SERVE__PORT=8010) and the command line (--set serve.port=8010). Values of the last two are read
as YAML, so that `true`, `8010` and `[a, b]` mean what they look like.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_core import to_jsonable_python

from cluster.errors import SettingsError
from cluster.times import CronLine, seconds_of

ENVIRONMENT_PREFIX = "FORGEARR_"
NOT_SETTINGS = {"FORGEARR_HOME", "FORGEARR_URL", "FORGEARR_API_KEY", "FORGEARR_OVERRIDES", "FORGEARR_RUNTIME"}
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
SECRET_NAMES = re.compile(r"key|secret|password|token|url", re.IGNORECASE)
PLACEHOLDERS = {"changeme", "change-me", "secret", "password", "your-secret-key"}


# How many in what time, as the limits library reads it: 100/minute, 10 per 15 minutes.
Rate = Annotated[str, Field(pattern=r"^[1-9]\d* ?(/|per) ?([1-9]\d* ?)?(second|minute|hour|day|month|year)s?$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServeSettings(Section):
    host: str = Field(description="Address that the gateway binds. Anything but loopback requires credentials.")
    port: int = Field(ge=1, le=65535, description="Port of every HTTP door: REST, OpenAI, Ollama, MCP, WebSocket.")
    replicas: int = Field(ge=1, le=64, description="Gateway processes. They keep no state; add some for throughput.")
    allowed_hosts: list[str] = Field(
        description="Host names, besides loopback, under which an open-mode server may be reached."
    )
    allowed_origins: list[str] = Field(
        description="Origins, besides its own, whose web pages may use this server (https://chat.example)."
    )
    trusted_proxies: list[str] = Field(
        description="Addresses or networks of reverse proxies in front of this server, whose X-Forwarded-For and "
        "X-Forwarded-Proto are believed. Everybody else's are ignored."
    )
    response_days: float = Field(gt=0, description="How long stored responses (/v1/responses) are kept.")
    environment: str = Field(description="A word of yours for this installation; /health repeats it.")

    @field_validator("trusted_proxies")
    @classmethod
    def refuse_names(cls, proxies: list[str]) -> list[str]:
        return [str(ip_network(proxy)) for proxy in proxies]

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK


class AuthSettings(Section):
    required: bool | None = Field(
        description="Whether every request needs a credential. Null: only when serve.host is not loopback."
    )
    registration: bool | None = Field(
        description="Whether strangers may register an account. Null: only when serve.host is loopback."
    )
    signing_key: SecretStr | None = Field(
        description="Key that signs access tokens, 32 characters or more, the same on every node. "
        "Null: made on first start in FORGEARR_HOME/keys."
    )
    sealing_key: SecretStr | None = Field(
        description="Key that seals credentials of repositories and keys of services, 32 characters or more, the same "
        "on every node. Null: made on first use in FORGEARR_HOME/keys."
    )
    access_token_minutes: int = Field(ge=1, le=1440, description="How long an access token is valid.")
    refresh_token_days: int = Field(ge=1, le=365, description="How long a refresh token is valid.")
    login_attempts: Rate = Field(description="How many failed logins an account and an address may have.")

    @field_validator("signing_key", "sealing_key")
    @classmethod
    def refuse_weak_key(cls, key: SecretStr | None) -> SecretStr | None:
        if key is None:
            return None
        if key.get_secret_value().lower() in PLACEHOLDERS or len(key.get_secret_value()) < 32:
            raise ValueError("must be a random key of at least 32 characters")
        return key


class LimitSettings(Section):
    enabled: bool | None = Field(
        description="Whether requests are rate-limited. Null: only where credentials are required."
    )
    storage: SecretStr = Field(
        description="Where counts live: memory:// (each gateway replica counts alone) or redis://… (all together)."
    )
    general: Rate = Field(description="Limit of each caller over all routes that have no limit of their own.")
    health: Rate = Field(description="Limit of each caller for the health routes.")
    content: Rate = Field(description="How many series and movies a caller may add, or have searched for.")
    audit: Rate = Field(description="How many audits of services a caller may ask for.")
    apply: Rate = Field(description="How often a caller may apply recommendations, or take them back.")
    recommendations: Rate = Field(description="How often a caller may read recommendations, rules and past audits.")


class DatabaseSettings(Section):
    url: SecretStr | None = Field(description="postgresql://user:password@host/name. Null: SQLite in FORGEARR_HOME.")
    pool_size: int = Field(ge=1, le=100, description="Connections that one process may hold to PostgreSQL.")


class StorageSettings(Section):
    url: str | None = Field(
        description="Where files of jobs live: a folder that every node shares, or s3://bucket/prefix. "
        "Null: a folder in FORGEARR_HOME."
    )


class FileSettings(Section):
    max_mb: int = Field(ge=1, le=1_048_576, description="Size of a file that comes in one request, in MiB.")
    max_upload_mb: int = Field(ge=1, le=1_048_576, description="Size of a file that comes in parts, in MiB.")


class RaySettings(Section):
    address: str | None = Field(
        pattern=r"^[^\s:/]+:\d{1,5}$",
        description="Address of a Ray cluster to join (host:port). Null: start one on this machine.",
    )
    port: int = Field(ge=1, le=65535, description="Port of the Ray head that is started on this machine.")
    dashboard_port: int = Field(ge=1, le=65535, description="Port of Ray's dashboard and of `ray job submit`.")
    cpus: int | None = Field(ge=1, description="CPUs that jobs may use on this machine. Null: all.")
    gpus: int | None = Field(ge=0, description="GPUs that jobs may use on this machine. Null: all.")
    object_store_mb: int = Field(ge=80, description="Shared memory of Ray's object store, in MB.")


class MlflowSettings(Section):
    enabled: bool = Field(description="Whether tracked jobs are recorded in MLflow.")
    tracking_uri: str | None = Field(description="An MLflow server to use (http://…). Null: start one on this machine.")
    port: int = Field(ge=1, le=65535, description="Port of the MLflow server that is started on this machine.")


class JobSettings(Section):
    modules: list[str] = Field(description="Modules that declare kinds of job.")
    workers: int = Field(ge=1, le=256, description="Warm worker processes for light jobs.")
    slots: int = Field(ge=1, le=256, description="Light jobs that one warm worker runs at a time.")
    lease_seconds: float = Field(
        ge=1, le=600, description="How long a worker may be silent before its jobs go to another one."
    )
    stop_grace_seconds: float = Field(
        ge=0.1, le=3600, description="How long a job may take to obey a cancel or its time limit."
    )
    max_losses: int = Field(
        ge=2,
        le=1000,
        description="How many times a job may lose its worker before it fails; the last time it had one of its own.",
    )
    retry_seconds: float = Field(ge=0, le=3600, description="Wait before the first retry; it doubles each time.")
    retry_cap_seconds: float = Field(ge=0, le=86400, description="Longest wait before a retry.")
    event_days: float = Field(gt=0, description="How long the events and logs of finished jobs are kept.")
    idempotency_hours: float = Field(gt=0, description="How long an idempotency key is remembered.")


class GateSettings(Section):
    max_perplexity: float | None = Field(
        gt=1, description="Highest perplexity on held-out samples that passes validation. Null: no limit."
    )
    max_perplexity_ratio: float | None = Field(gt=0, description="Highest perplexity, as a part of the base model's.")
    min_rouge_l: float | None = Field(ge=0, le=1, description="Least ROUGE-L of generated answers.")
    min_exact_match: float | None = Field(ge=0, le=1, description="Least part of answers that are exactly right.")
    min_top1_agreement: float | None = Field(
        ge=0, le=1, description="Least part of tokens on which the exported file agrees with the trained model."
    )
    max_kl: float | None = Field(ge=0, description="Highest mean divergence (KL, in nats) of the exported file.")


class ForgeSettings(Section):
    folders: list[Path] = Field(
        description="Folders on this machine from which anybody may train, or take a base model. An administrator "
        "may use any."
    )
    converter: Path | None = Field(
        description="Folder of llama.cpp's own converter (convert_hf_to_gguf.py). Null: fetched once, from the source "
        "package of the installed llama-cpp-python."
    )


class EngineSettings(Section):
    memory_mb: int | None = Field(
        ge=64, description="Memory that loaded models may take in each engine. Null: half of what the machine has."
    )
    replicas: int = Field(ge=0, le=64, description="Most processes that run GGUF models.")
    least_replicas: int | None = Field(
        ge=0, le=64, description="How many of them run while nobody asks; more as requests come. Null: all, always."
    )
    idle_seconds: float = Field(gt=0, description="After which a process that nobody asks goes, where that is allowed.")
    transformers_replicas: int = Field(
        ge=0,
        le=64,
        description="Most processes that run models that are no GGUF. None runs before somebody asks for such a model.",
    )
    folders: dict[str, str] = Field(
        description="Names for models that are no GGUF: folders on this machine, or ids of the Hugging Face hub."
    )
    load_in_4bit: bool = Field(description="Whether models that are no GGUF are packed into 4 bits as they are loaded.")
    slots: int = Field(ge=1, le=64, description="Requests that one loaded model answers at the same time.")
    queue: int = Field(ge=0, le=10_000, description="Requests that may wait for a slot before others get a 503.")
    context: int = Field(ge=256, le=1_048_576, description="Tokens that a conversation may have, if the model can.")
    threads: int | None = Field(ge=1, le=1024, description="Processor threads of one engine. Null: all cores.")
    gpu_layers: int = Field(ge=-1, description="Layers of a model that go to the GPU. -1: all, when there is one.")
    keep_alive: float | str | None = Field(
        description="How long a model stays in memory after its last answer: seconds, or 10m; 0 is not at all. "
        "Null: until its memory is needed."
    )
    cache_gb: float = Field(gt=0, description="Disk that copies of model files may take on each machine.")

    @field_validator("keep_alive")
    @classmethod
    def know_duration(cls, duration: float | str | None) -> float | None:
        return None if duration is None else seconds_of(duration)


class OllamaSettings(Section):
    url: str | None = Field(
        pattern=r"^https?://[^\s@]+$",
        description="An Ollama server that gets every deployed model, and whose models answer here. Null: none.",
    )


class GuardianSettings(Section):
    roots: list[Path] = Field(
        description="Folders under which repositories may lie. A relative path is looked for in each of them in turn."
    )
    watch_cron: CronLine = Field(
        description="How often all repositories are looked at: minute, hour, day, month, weekday. Read when the first "
        "repository is registered; the schedule `watch-repositories` can be changed from then on."
    )
    min_samples: int = Field(ge=1, description="Samples that a retraining needs to learn from; with fewer it stops.")
    min_improvement: float = Field(
        ge=0,
        lt=1,
        description="How much better than the served version a retrained one must be to take its place: the part by "
        "which it needs fewer bits per character of held-out answers.",
    )
    min_feedback: int | None = Field(
        ge=1, description="New feedback on a model, with something to learn in it, that retrains it. Null: never."
    )
    held_out: float = Field(
        ge=0, le=0.5, description="Part of a repository's files that is never learned from, only asked about."
    )
    max_characters: int = Field(
        ge=500, le=1_000_000, description="How long one example from a repository may be, question and answer together."
    )
    max_file_kb: int = Field(ge=1, le=100_000, description="Larger files of a repository are not read.")
    commits: int = Field(ge=0, le=100_000, description="How many of its newest commits are learned from.")

    @field_validator("roots")
    @classmethod
    def have_one(cls, roots: list[Path]) -> list[Path]:
        if not roots or not all(root.is_absolute() or root.parts[:1] == ("~",) for root in roots):
            raise ValueError("must be one folder or more, each beginning with / or ~")
        return roots


class DeclaredService(Section):
    """An outside service in `services.declared`. Its type and url are checked when Forgearr starts."""

    name: str = Field(min_length=1, max_length=100)
    type: str
    url: str
    api_key: SecretStr | None = Field(default=None, min_length=1)
    verify_tls: bool = True
    enabled: bool = True


class ServiceSettings(Section):
    declared: list[DeclaredService] = Field(
        description="Outside services (name, type, url, api_key, verify_tls, enabled), besides those that are added "
        "over the API. There they can be seen, but not changed."
    )
    timeout_seconds: float = Field(gt=0, le=600, description="How long a service may take for an answer.")
    check_cron: CronLine = Field(
        description="How often all services are checked: minute, hour, day, month, weekday. Read when the first "
        "service is added; the schedule `check-services` can be changed from then on."
    )
    history_days: float = Field(gt=0, description="How long the results of those checks are kept.")
    breaker_threshold: int = Field(
        ge=1, le=1000, description="How many failures in a row make Forgearr leave a service alone."
    )
    breaker_seconds: float = Field(gt=0, le=86400, description="For how long, before it is tried again.")


class MediaSettings(Section):
    watch_cron: CronLine = Field(
        description="How often downloads are looked at: minute, hour, day, month, weekday. Read when the first service "
        "is added; the schedule `watch-downloads` can be changed from then on."
    )
    history_days: float = Field(
        gt=0, le=10_000, description="How long downloads that have ended, and what was decided about them, are kept."
    )
    folders: dict[str, str] = Field(
        description="Where folders of services lie on this machine ({/downloads: /mnt/nas/downloads}), if not under "
        "the same path. What is nowhere here is not looked into."
    )


class RecoverySettings(Section):
    """The policy of recoveries, until an administrator has set another one."""

    enabled: bool = Field(description="Whether failed and stuck downloads are looked into at all.")
    dry_run: bool = Field(description="Only say what would be done.")
    strikes: int = Field(
        ge=1, le=1000, description="How many looks in a row must have seen no progress, before a download is stuck."
    )
    stuck_minutes: float = Field(ge=0, le=100_000, description="And for how long there must have been none.")
    grace_minutes: float = Field(
        ge=0, le=100_000, description="How long Sonarr and its like may take to deal with a failure themselves."
    )
    cooldown_minutes: float = Field(
        ge=0, le=100_000, description="How long a download, or one of the same title, is left alone after an action."
    )
    max_per_hour: int = Field(ge=0, le=10_000, description="How many actions an hour may see.")
    max_retries: int = Field(
        ge=0, le=100, description="How often a failed download that nobody else knows is fetched again."
    )
    search_again: bool = Field(description="Have another release searched for, when one is removed.")
    protected_tags: list[str] = Field(
        max_length=100,
        description="What has one of these tags, or lies in a category of this name, is never touched.",
    )
    leave_messages: list[str] = Field(
        max_length=100,
        description="What is said of a download that only a person can help: words of it, whatever their capitals.",
    )
    leftovers: Literal["report", "remove"] = Field(
        description="What becomes of folders of failed downloads that SABnzbd no longer knows."
    )
    leftover_days: float = Field(gt=0, le=10_000, description="How old such a folder must be to be removed.")


class AuditSettings(Section):
    rules: Path | None = Field(
        description="Folder with rules of your own (*.yaml) for audits of services. Null: `audit` in FORGEARR_HOME."
    )
    history_days: float = Field(gt=0, description="How long audits are kept, and what was closed or applied.")


class LogSettings(Section):
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(description="Least severe level that is written.")
    rotate_mb: int = Field(ge=1, description="Size at which a log file is set aside.")


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
    forge: ForgeSettings
    gates: GateSettings
    engines: EngineSettings
    ollama: OllamaSettings
    guardian: GuardianSettings
    services: ServiceSettings
    media: MediaSettings
    recovery: RecoverySettings
    audit: AuditSettings
    logs: LogSettings

    @property
    def auth_required(self) -> bool:
        return not self.serve.is_loopback if self.auth.required is None else self.auth.required

    @property
    def registration_open(self) -> bool:
        return self.serve.is_loopback if self.auth.registration is None else self.auth.registration

    @property
    def limits_enabled(self) -> bool:
        return self.auth_required if self.limits.enabled is None else self.limits.enabled

    @property
    def database_url(self) -> str:
        if self.database.url is None:
            return f"sqlite+aiosqlite:///{home() / 'forgearr.db'}"
        return self.database.url.get_secret_value().replace("postgresql://", "postgresql+asyncpg://", 1)

    @property
    def storage_url(self) -> str:
        return self.storage.url or str(home() / "storage")

    @property
    def mlflow_uri(self) -> str | None:
        if not self.mlflow.enabled:
            return None
        return self.mlflow.tracking_uri or f"http://127.0.0.1:{self.mlflow.port}"

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the gateway."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(self.serve.host, self.serve.host)  # noqa: S104
        return f"http://{host}:{self.serve.port}"


class LoadedSettings:
    """The settings in force, with the origin of each."""

    def __init__(self, settings: Settings, origins: Mapping[str, str]) -> None:
        self.settings = settings
        self.origins = origins

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """(key, printable value, origin) of every setting, secrets masked."""
        for section_name in Settings.model_fields:
            section = getattr(self.settings, section_name)
            for name in type(section).model_fields:
                key = f"{section_name}.{name}"
                yield key, _printable(getattr(section, name)), self.origins[key]


def home() -> Path:
    """The folder that holds all state of this installation, made on first use."""
    folder = Path(os.environ.get("FORGEARR_HOME") or Path.home() / ".forgearr").expanduser().absolute()
    if not folder.exists():
        folder.mkdir(parents=True, mode=0o700)
    return folder


@cache
def get_settings() -> Settings:
    return load_settings().settings


def load_settings(overrides: Sequence[str] = ()) -> LoadedSettings:
    """Read all four layers; `overrides` are the command line's `key=value`."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in _layers(overrides):
        for key, value in layer.items():
            values[key], origins[key] = value, origin
    nested: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        nested.setdefault(section, {})[name] = value
    try:
        return LoadedSettings(Settings.model_validate(nested), origins)
    except ValidationError as error:
        raise SettingsError(_sentence(error, values, origins)) from None


def export_overrides(overrides: Sequence[str]) -> None:
    """Hand the command line's settings to the processes that this one starts."""
    os.environ["FORGEARR_OVERRIDES"] = "\n".join(overrides)


def _layers(overrides: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield (
        "configs/forgearr.yaml",
        _read_yaml(files("configs").joinpath("forgearr.yaml").read_text(), "configs/forgearr.yaml"),
    )
    own_file = home() / "forgearr.yaml"
    if own_file.exists():
        yield str(own_file), _read_yaml(own_file.read_text(), str(own_file))
    for variable, text in sorted(os.environ.items()):
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in NOT_SETTINGS:
            key = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".", 1)
            yield f"environment variable {variable}", {key: _read_scalar(text)}
    for override in overrides or os.environ.get("FORGEARR_OVERRIDES", "").splitlines():
        key, equals, text = override.partition("=")
        if not equals:
            raise SettingsError(f"--set takes key=value, not '{override}'.")
        yield "command line", {key.strip(): _read_scalar(text)}


def _read_yaml(text: str, origin: str) -> dict[str, Any]:
    """A settings file as {'section.name': value}."""
    try:
        # Every process begins with this, and C does it ten times as fast.
        document: Any = yaml.load(text, yaml.CSafeLoader) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"{origin} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(document, dict):
        raise SettingsError(f"{origin} must hold sections with settings, such as 'serve:'.")
    flat: dict[str, Any] = {}
    for section, content in document.items():
        if not isinstance(content, dict):
            raise SettingsError(f"'{section}' in {origin} must be a section with settings under it, not {content!r}.")
        flat |= {f"{section}.{name}": value for name, value in content.items()}
    return flat


def _read_scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _sentence(error: ValidationError, values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"][:2])
    # A section that does not exist is reported without the name under it.
    key = next((known for known in values if known == key or known.startswith(f"{key}.")), key)
    deeper = ".".join(str(part) for part in first["loc"][2:])
    if first["type"] == "extra_forbidden" and not deeper:
        shown = "(hidden)" if SECRET_NAMES.search(f"{key} {values[key]!r}") else repr(values[key])
        return f"Unknown setting '{key}' (set to {shown} by {origins[key]}); docs/settings.md lists those there are."
    reason = (f"{deeper}: " if deeper else "") + first["msg"].removeprefix("Value error, ")
    shown = "(hidden)" if _is_secret(key) else repr(values.get(key))
    return f"Setting '{key}' cannot be {shown} (from {origins.get(key, 'nowhere')}): {reason}."


def _is_secret(key: str) -> bool:
    section, _, name = key.partition(".")
    model: Any = Settings.model_fields[section].annotation if section in Settings.model_fields else None
    field = model.model_fields.get(name) if model else None
    return field is not None and _holds_secret(field.annotation)


def _holds_secret(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return any(_holds_secret(field.annotation) for field in annotation.model_fields.values())
    return annotation is SecretStr or any(_holds_secret(part) for part in get_args(annotation))


def _printable(value: object) -> str:
    if isinstance(value, SecretStr):
        return _masked(value.get_secret_value())
    if value is None:
        return "null"
    plain = to_jsonable_python(value)  # folders as text
    return yaml.safe_dump(plain, default_flow_style=True).strip().removesuffix("...").strip()


def _masked(secret: str) -> str:
    """A URL keeps everything but its password, so that one can see which server it names."""
    parts = urlsplit(secret)
    if not parts.scheme or "//" not in secret:
        return "********"
    return secret.replace(f":{parts.password}@", ":********@") if parts.password else secret
