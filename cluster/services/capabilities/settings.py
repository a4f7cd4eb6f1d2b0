"""The settings of services, which are read and written area by area.

An area is one thing with settings, or a list of such things: then its name ends in `[]`, as in `downloadclient[]`. What
is secret is told only as being there: no password and no key leaves this room but to its own service.
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
    """One thing that has settings."""

    key: str  # which one of its area; empty where there is only one
    name: str  # what people call it
    values: Mapping[str, Any]
    raw: Any = field(default=None, repr=False)  # as the service has told it, secrets included: to be sent back


@dataclass(frozen=True)
class SettingsAreas:
    """How the settings of a sort of service are read, and written."""

    read: Callable[[Client, str], Awaitable[list[SettingsEntry]]]
    write: Callable[
        [Client, str, SettingsEntry, Mapping[str, Any]], Awaitable[None]
    ]  # into an entry that was just read
    writable: frozenset[str]
    readable: frozenset[str] = frozenset()  # besides those

    @property
    def names(self) -> frozenset[str]:
        return self.readable | self.writable


def is_list(area: str) -> bool:
    return area.endswith("[]")


def is_secret(setting: str) -> bool:
    return SECRET_PATTERN.search(setting) is not None


def mask_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """These settings, with whatever is secret in them only as being there or not."""
    return {name: (MASK if value else "") if is_secret(name) else value for name, value in values.items()}


def normalize(value: Any) -> Any:
    """A value in the one form in which it can be compared: services say 1, "1", true and "true" for the same."""
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
    """What a service shows as asterisks would be written back as asterisks."""
    for name, value in values.items():
        if isinstance(value, str) and value and not value.strip("*"):
            raise Refused(
                f"{client.connection.name} hides its setting '{name}', which would have to be sent along: "
                "change this by hand."
            )


def _parse_number(text: str) -> int | float | str:
    if not re.fullmatch(r"-?\d{1,15}(\.\d{1,15})?", text, re.ASCII):
        return text
    return float(text) if "." in text else int(text)
