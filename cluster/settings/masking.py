"""Turn the values of settings into text, with secrets masked."""

import re
from typing import Any, get_args
from urllib.parse import SplitResult, urlsplit

import yaml
from pydantic import BaseModel, SecretStr
from pydantic_core import to_jsonable_python

from cluster.settings.root import Settings

MASK = "********"
SECRET_NAMES = re.compile(r"key|secret|password|passphrase|token|url", re.IGNORECASE)


def is_secret(key: str) -> bool:
    section, _, name = key.partition(".")
    model: Any = Settings.model_fields[section].annotation if section in Settings.model_fields else None
    field = model.model_fields.get(name) if model else None
    return field is not None and _holds_secret(field.annotation)


def _holds_secret(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return any(_holds_secret(field.annotation) for field in annotation.model_fields.values())
    return annotation is SecretStr or any(_holds_secret(part) for part in get_args(annotation))


def is_confidential(key: str, value: object) -> bool:
    """Whether a value of this setting must stay secret. An address without credentials need not."""
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    return bool(text) and is_secret(key) and not (isinstance(text, str) and _is_plain_address(text))


def to_text(value: object) -> str:
    if isinstance(value, SecretStr):
        return mask_url(value.get_secret_value())
    if value is None:
        return "null"
    jsonable = to_jsonable_python(value)  # turns paths into text
    return yaml.safe_dump(jsonable, default_flow_style=True).strip().removesuffix("...").strip()


def mask_url(url: str) -> str:
    """Mask the secrets of a URL: its password, its query, and the user of a web server, which may be a token.

    Text that is no URL is masked as a whole.
    """
    parts = _split(url)
    if parts is None:
        return MASK
    if _is_plain_address(url):
        return url
    credentials, at, server = parts.netloc.rpartition("@")
    user, colon, _ = credentials.partition(":")
    masked = f"{user}:{MASK}" if colon else MASK if parts.scheme in {"http", "https"} else user
    return parts._replace(netloc=f"{masked}@{server}" if at else server, query=MASK if parts.query else "").geturl()


def _is_plain_address(text: str) -> bool:
    parts = _split(text)
    return parts is not None and "@" not in parts.netloc and not parts.query


def _split(url: str) -> SplitResult | None:
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    return parts if parts.scheme and url.lower().startswith(f"{parts.scheme}://") else None
