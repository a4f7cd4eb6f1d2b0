"""The capability to read and write the settings of a service, area by area.

An area is one entry with settings, or a list of entries; then its name ends in `[]`, as in `downloadclient[]`. Secret
values are masked: a password or a key is sent to its own service only.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.logs import MASK
from cluster.services.errors import Refused
from cluster.services.http.client import Client

SECRET_PATTERN = re.compile(
    r"passw|pwd|passphrase|passkey|(api|nzb|user|rss|access|private)_?key|token|secret|cookie|credential", re.I
)
BOOLEAN_VALUES = {"true": 1, "false": 0}


@dataclass(frozen=True)
class SettingsEntry:
    """Settings that belong together, such as those of a download client."""

    key: str  # identifies it in a list; empty in an area with one entry
    name: str  # for people
    values: Mapping[str, Any]
    raw: Any = field(default=None, repr=False)  # as the service sent it, with secrets; it is sent back to write


@dataclass(frozen=True)
class SettingsAreas:
    """How the settings of a type of service are read and written."""

    read: Callable[[Client, str], Awaitable[list[SettingsEntry]]]
    write: Callable[
        [Client, str, SettingsEntry, Mapping[str, Any]], Awaitable[None]
    ]  # changes an entry that was just read
    writable: frozenset[str]
    readable: frozenset[str] = frozenset()  # areas that can only be read

    @property
    def names(self) -> frozenset[str]:
        return self.readable | self.writable


def is_list(area: str) -> bool:
    return area.endswith("[]")


def is_secret(setting: str) -> bool:
    return SECRET_PATTERN.search(setting) is not None


def mask_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Mask the values of secrets. An empty value stays empty."""
    return {name: (MASK if value else "") if is_secret(name) else value for name, value in values.items()}


def normalize(value: Any) -> Any:
    """Return a value in a form that can be compared: services send 1, "1", true and "true" for the same value."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str):
        text = value.strip()
        return BOOLEAN_VALUES.get(text.casefold(), _parse_number(text))
    if isinstance(value, list):
        return [normalize(item) for item in value]
    return value


def settings_equal(left: Any, right: Any) -> bool:
    return normalize(left) == normalize(right)


def reject_masked(client: Client, values: Mapping[str, Any]) -> None:
    """Refuse to write values that the service masks: it would store the asterisks."""
    for name, value in values.items():
        if isinstance(value, str) and value and not value.strip("*"):
            raise Refused(
                f"{client.connection.name} masks its setting '{name}', which would have to be sent too: "
                "change this in the service itself."
            )


def _parse_number(text: str) -> int | float | str:
    if not re.fullmatch(r"-?\d{1,15}(\.\d{1,15})?", text, re.ASCII):
        return text
    return float(text) if "." in text else int(text)
