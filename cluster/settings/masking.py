"""Turn the values of settings into text, with secrets masked."""

import re
from typing import Any, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, SecretStr
from pydantic_core import to_jsonable_python

from cluster.settings.root import Settings

SECRET_NAMES = re.compile(r"key|secret|password|token|url", re.IGNORECASE)


def is_secret(key: str) -> bool:
    section, _, name = key.partition(".")
    model: Any = Settings.model_fields[section].annotation if section in Settings.model_fields else None
    field = model.model_fields.get(name) if model else None
    return field is not None and _holds_secret(field.annotation)


def _holds_secret(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return any(_holds_secret(field.annotation) for field in annotation.model_fields.values())
    return annotation is SecretStr or any(_holds_secret(part) for part in get_args(annotation))


def to_text(value: object) -> str:
    if isinstance(value, SecretStr):
        return _masked(value.get_secret_value())
    if value is None:
        return "null"
    jsonable = to_jsonable_python(value)  # turns paths into text
    return yaml.safe_dump(jsonable, default_flow_style=True).strip().removesuffix("...").strip()


def _masked(secret: str) -> str:
    """Mask a secret. Of a URL, only the password is masked, so that the server stays visible."""
    parts = urlsplit(secret)
    if not parts.scheme or "//" not in secret:
        return "********"
    return secret.replace(f":{parts.password}@", ":********@") if parts.password else secret
