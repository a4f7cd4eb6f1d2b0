"""Settings of the HTTP server: its address, credentials and rate limits."""

from ipaddress import ip_network

from pydantic import Field, SecretStr, field_validator

from cluster.settings.base import LOOPBACK, Rate, Section

PLACEHOLDERS = {"changeme", "change-me", "secret", "password", "your-secret-key"}


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
    def parse_networks(cls, proxies: list[str]) -> list[str]:
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
