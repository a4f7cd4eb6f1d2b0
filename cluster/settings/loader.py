"""Load the settings from their four layers, and record the origin of each value.

A later layer overrides the earlier ones: configs/forgearr.yaml (every default), $FORGEARR_HOME/forgearr.yaml, the
environment (FORGEARR_SERVE__PORT=8010), the command line (--set serve.port=8010). Values of the last two are parsed as
YAML, so `true`, `8010` and `[a, b]` get the types that they look like.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.errors import SettingsError
from cluster.settings.base import home
from cluster.settings.masking import SECRET_NAMES, is_secret, to_text
from cluster.settings.root import Settings

DEFAULTS = "configs/forgearr.yaml"
ENVIRONMENT_PREFIX = "FORGEARR_"
RESERVED_VARIABLES = {"FORGEARR_HOME", "FORGEARR_URL", "FORGEARR_API_KEY", "FORGEARR_OVERRIDES", "FORGEARR_RUNTIME"}


class LoadedSettings:
    """The settings in force, with the origin of each."""

    def __init__(self, settings: Settings, origins: Mapping[str, str]) -> None:
        self.settings = settings
        self.origins = origins

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield (key, printable value, origin) of every setting. Secrets are masked."""
        for section_name in Settings.model_fields:
            section = getattr(self.settings, section_name)
            for name in type(section).model_fields:
                key = f"{section_name}.{name}"
                yield key, to_text(getattr(section, name)), self.origins[key]


@cache
def get_settings() -> Settings:
    return load_settings().settings


def load_settings(overrides: Sequence[str] = ()) -> LoadedSettings:
    """Load all four layers. `overrides` are `key=value` assignments from the command line."""
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
        raise SettingsError(_error_message(error, values, origins)) from None


def export_overrides(overrides: Sequence[str]) -> None:
    """Pass the settings of the command line to the processes that this one starts."""
    os.environ["FORGEARR_OVERRIDES"] = "\n".join(overrides)


def _layers(overrides: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield DEFAULTS, _read_yaml(files("configs").joinpath("forgearr.yaml").read_text(), DEFAULTS)
    user_file = home() / "forgearr.yaml"
    if user_file.exists():
        yield str(user_file), _read_yaml(user_file.read_text(), str(user_file))
    for variable, text in sorted(os.environ.items()):
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in RESERVED_VARIABLES:
            key = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".", 1)
            yield f"environment variable {variable}", {key: _read_scalar(text)}
    for override in overrides or os.environ.get("FORGEARR_OVERRIDES", "").splitlines():
        key, equals, text = override.partition("=")
        if not equals:
            raise SettingsError(f"--set takes key=value, not '{override}'.")
        yield "command line", {key.strip(): _read_scalar(text)}


def _read_yaml(text: str, origin: str) -> dict[str, Any]:
    """Return a settings file as {'section.name': value}."""
    try:
        # Every process does this at its start. The parser in C is ten times as fast.
        document: Any = yaml.load(text, yaml.CSafeLoader) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"{origin} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(document, dict):
        raise SettingsError(f"{origin} must contain sections with settings, such as 'serve:'.")
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


def _error_message(error: ValidationError, values: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"][:2])
    # For an unknown section, pydantic reports only the section.
    key = next((known for known in values if known == key or known.startswith(f"{key}.")), key)
    subpath = ".".join(str(part) for part in first["loc"][2:])
    if first["type"] == "extra_forbidden" and not subpath:
        shown = "(hidden)" if SECRET_NAMES.search(f"{key} {values[key]!r}") else repr(values[key])
        return f"Unknown setting '{key}' (set to {shown} by {origins[key]}); docs/settings.md lists all settings."
    reason = (f"{subpath}: " if subpath else "") + first["msg"].removeprefix("Value error, ")
    shown = "(hidden)" if is_secret(key) else repr(values.get(key))
    return f"Setting '{key}' cannot be {shown} (from {origins.get(key, 'nowhere')}): {reason}."
