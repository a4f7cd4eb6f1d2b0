"""Load the settings from their four layers, and record the origin of each value.

A later layer overrides the earlier ones: configs/forgearr.yaml (every default), $FORGEARR_HOME/forgearr.yaml, the
environment (FORGEARR_SERVE__PORT=8010), the command line (--set serve.port=8010). Values of the last two are parsed as
YAML, so `true`, `8010` and `[a, b]` get the types that they look like.
"""

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.errors import SettingsError
from cluster.settings.base import home
from cluster.settings.masking import SECRET_NAMES, is_confidential, is_secret, to_text
from cluster.settings.root import Settings

DEFAULTS = "configs/forgearr.yaml"
ENVIRONMENT_PREFIX = "FORGEARR_"
NODE_SECRETS_VARIABLE = "FORGEARR_NODE_SECRETS"
"""Names the settings that each node of a joined cluster must have itself, because secrets are not sent to it."""
NODE_VERSION_VARIABLE = "FORGEARR_NODE_VERSION"
"""The version that each node of a joined cluster must have."""
RESERVED_VARIABLES = {
    "FORGEARR_HOME",
    "FORGEARR_URL",
    "FORGEARR_API_KEY",
    "FORGEARR_OVERRIDES",
    "FORGEARR_RUNTIME",
    NODE_SECRETS_VARIABLE,
    NODE_VERSION_VARIABLE,
}


class LoadedSettings:
    """The settings in force, with the origin of each."""

    def __init__(self, settings: Settings, origins: Mapping[str, str]) -> None:
        self.settings = settings
        self.origins = origins

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield (key, printable value, origin) of every setting. Secrets are masked."""
        for key, value in self.values():
            yield key, to_text(value), self.origins[key]

    def values(self) -> Iterator[tuple[str, Any]]:
        for section_name in Settings.model_fields:
            section = getattr(self.settings, section_name)
            for name in type(section).model_fields:
                yield f"{section_name}.{name}", getattr(section, name)


@cache
def get_settings() -> Settings:
    return load_settings().settings


def load_settings(overrides: Sequence[str] = (), user_file: Path | None = None) -> LoadedSettings:
    """Load all four layers. `overrides` are `key=value` assignments from the command line.

    `user_file` stands for $FORGEARR_HOME/forgearr.yaml.
    """
    _require_node_version()
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in _layers(overrides, user_file or home() / "forgearr.yaml"):
        for key, value in layer.items():
            values[key], origins[key] = value, origin
    _require_node_secrets(origins)
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


def node_environment() -> dict[str, str]:
    """Return the variables with which the other nodes of a cluster get our settings.

    Ray shows them to every program of the cluster, and logs them. So secrets are left out, and only named.
    """
    loaded = load_settings()
    variables = {"FORGEARR_HOME": str(home())}
    for variable, text in os.environ.items():
        key = _key_of(variable)
        if key and not is_confidential(key, _read_scalar(text)):
            variables[variable] = text
    if overrides := os.environ.get("FORGEARR_OVERRIDES"):
        variables["FORGEARR_OVERRIDES"] = overrides
    keys = [key for key, value in loaded.values() if is_confidential(key, value)]
    return variables | {NODE_SECRETS_VARIABLE: " ".join(keys), NODE_VERSION_VARIABLE: version("forgearr")}


def _require_node_version() -> None:
    required, installed = os.environ.get(NODE_VERSION_VARIABLE), version("forgearr")
    if required and required != installed:
        raise SettingsError(
            f"This node ({platform.node()}) has Forgearr {installed}, and the installation {required}: install the "
            "same version on all nodes."
        )


def _require_node_secrets(origins: Mapping[str, str]) -> None:
    for key in os.environ.get(NODE_SECRETS_VARIABLE, "").split():
        if origins[key] == DEFAULTS:
            raise SettingsError(
                f"'{key}' is set where `forgearr up` runs, and not on this node ({platform.node()}). Secrets are not "
                f"sent to nodes: set {_variable_of(key)} in the environment of `ray start`, or write it to "
                f"{home() / 'forgearr.yaml'} there."
            )


def _layers(overrides: Sequence[str], user_file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    yield DEFAULTS, _read_yaml(files("configs").joinpath("forgearr.yaml").read_text(), DEFAULTS)
    if user_file.exists():
        yield str(user_file), _read_yaml(user_file.read_text(), str(user_file))
    for variable, text in sorted(os.environ.items()):
        if key := _key_of(variable):
            yield f"environment variable {variable}", {key: _read_scalar(text)}
    for override in overrides or os.environ.get("FORGEARR_OVERRIDES", "").splitlines():
        key, equals, text = override.partition("=")
        if not equals:
            raise SettingsError(f"--set takes key=value, not '{override}'.")
        key, value = key.strip(), _read_scalar(text)
        if is_confidential(key, value):
            raise SettingsError(
                f"'{key}' is a secret, and every account of this machine can read command lines: choose another "
                f"value, and set it as {_variable_of(key)} in the environment or in {home() / 'forgearr.yaml'}."
            )
        yield "command line", {key: value}


def _variable_of(key: str) -> str:
    """Return the environment variable of a setting."""
    return ENVIRONMENT_PREFIX + key.upper().replace(".", "__", 1)


def _key_of(variable: str) -> str | None:
    """Return the setting of an environment variable. None: it is not one of a setting."""
    if not variable.startswith(ENVIRONMENT_PREFIX) or variable in RESERVED_VARIABLES:
        return None
    return variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".", 1)


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
