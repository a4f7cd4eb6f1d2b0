"""Settings of the HTTP server: its address, credentials and rate limits."""

from ipaddress import ip_network

from pydantic import Field, SecretStr, field_validator

from cluster.settings.base import LOOPBACK, Rate, Section

MIN_KEY_LENGTH = 32
PLACEHOLDERS = {"changeme", "change-me", "secret", "password", "your-secret-key"}


class ServeSettings(Section):
    host: str = Field(description="Address that the gateway binds. Any but loopback requires credentials.")
    port: int = Field(ge=1, le=65535, description="Port of all HTTP APIs: REST, OpenAI, Ollama, MCP, WebSocket.")
    replicas: int = Field(ge=1, le=64, description="Gateway processes. They are stateless; add some for throughput.")
    allowed_hosts: list[str] = Field(
        description="Host names, besides loopback, that requests to a server without credentials may name."
    )
    allowed_origins: list[str] = Field(
        description="Origins, besides its own, whose web pages may use this server (https://chat.example)."
    )
    trusted_proxies: list[str] = Field(
        description="Addresses or networks of reverse proxies in front of this server. X-Forwarded-For and "
        "X-Forwarded-Proto are accepted from them only."
    )
    response_days: float = Field(gt=0, description="How long responses (/v1/responses) are stored.")
    environment: str = Field(description="A name for this installation, which /health returns.")

    @field_validator("trusted_proxies")
    @classmethod
    def parse_networks(cls, proxies: list[str]) -> list[str]:
        return [str(ip_network(proxy)) for proxy in proxies]

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK


class AuthSettings(Section):
    required: bool | None = Field(
        description="Whether every request needs a credential. Null: unless serve.host is loopback and ray.address is "
        "null. It cannot be off elsewhere."
    )
    registration: bool | None = Field(
        description="Whether anyone may register an account. Null: only when no credential is required."
    )
    signing_key: SecretStr | None = Field(
        description="Key that signs access tokens, at least 32 characters, the same on every node. "
        "Null: created on first use in FORGEARR_HOME/keys."
    )
    sealing_key: SecretStr | None = Field(
        description="Key that encrypts credentials of repositories and keys of services, at least 32 characters, the "
        "same on every node. Null: created on first use in FORGEARR_HOME/keys."
    )
    old_sealing_key: SecretStr | None = Field(
        description="An earlier sealing key, which only decrypts. Set it on every node while `forgearr keys rotate` "
        "encrypts everything with the new one."
    )
    access_token_minutes: int = Field(ge=1, le=1440, description="How long an access token is valid.")
    refresh_token_days: int = Field(ge=1, le=365, description="How long a refresh token is valid.")
    max_api_keys: int = Field(ge=1, le=10_000, description="How many API keys an account may have.")
    login_attempts: Rate = Field(description="Rate limit of failed logins of one account from one address.")
    address_login_attempts: Rate = Field(
        description="Rate limit of failed logins from one address, of all accounts together."
    )

    @field_validator("signing_key", "sealing_key", "old_sealing_key")
    @classmethod
    def refuse_weak_key(cls, key: SecretStr | None) -> SecretStr | None:
        if key is None:
            return None
        if key.get_secret_value().lower() in PLACEHOLDERS or len(key.get_secret_value()) < MIN_KEY_LENGTH:
            raise ValueError(f"must be a random key of at least {MIN_KEY_LENGTH} characters")
        return key


class LimitSettings(Section):
    enabled: bool | None = Field(
        description="Whether requests are rate-limited. Null: only where credentials are required."
    )
    storage: SecretStr = Field(
        description="Where requests are counted: memory:// (each gateway replica for itself) or redis://… (all "
        "replicas together)."
    )
    general: Rate = Field(description="Limit of each caller for all routes that have no limit of their own.")
    health: Rate = Field(description="Limit of each caller for the health routes.")
    content: Rate = Field(description="Limit of each caller for adding, and searching for, series and movies.")
    audit: Rate = Field(description="Limit of each caller for starting audits of services.")
    apply: Rate = Field(description="Limit of each caller for applying recommendations and rolling them back.")
    recommendations: Rate = Field(description="Limit of each caller for reading recommendations, rules and audits.")
    account_jobs: int | None = Field(
        ge=0, description="Unfinished jobs that one user may have. Children of jobs do not count. Null: no limit."
    )
    account_schedules: int | None = Field(ge=0, description="Schedules that one user may have. Null: no limit.")
    account_batches: int | None = Field(
        ge=0, description="Unfinished batches (/v1/batches) that one user may have. Null: no limit."
    )
    account_files_mb: int | None = Field(
        ge=0,
        description="MB of files and pending uploads that one user may have. What jobs write is not refused. Null: no "
        "limit.",
    )
    account_datasets_mb: int | None = Field(ge=0, description="MB of datasets that one user may have. Null: no limit.")
    account_responses_mb: int | None = Field(
        ge=0, description="MB of stored responses that one user may have. Null: no limit."
    )
    account_models_mb: int | None = Field(
        ge=0,
        description="MB of trained models and registered versions that one user may have. Whoever has more can neither "
        "train nor export. Null: no limit.",
    )
    account_gpu_hours: int | None = Field(
        ge=0,
        description="GPU hours that the jobs of one user may use in 24 hours. Others of them wait then; those that run "
        "go on. Null: no limit.",
    )
