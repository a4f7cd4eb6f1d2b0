"""The conditions of audit rules: a few operators on settings, and no code."""

import re
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from cluster.services.capabilities.settings import SettingsEntry, normalize, settings_equal

Number = int | float
SettingsByArea = Mapping[str, list[SettingsEntry]]
"""The settings of a service that were read, by area."""

MAX_PATTERN_LENGTH = 300


class SettingReference(BaseModel):
    model_config = ConfigDict(extra="forbid")

    area: str
    setting: str


class Expectation(BaseModel):
    """One operator, which a setting must meet."""

    model_config = ConfigDict(extra="forbid", strict=True)

    equals: JsonValue = None
    one_of: list[JsonValue] | None = Field(default=None, min_length=1)
    at_least: Number | None = None
    at_most: Number | None = None
    between: list[Number] | None = Field(default=None, min_length=2, max_length=2)
    empty: bool | None = Field(default=None, description="True: it must be empty. False: it must not be.")
    matches: str | None = Field(
        default=None, max_length=MAX_PATTERN_LENGTH, description="A regular expression that must match."
    )
    not_matches: str | None = Field(default=None, max_length=MAX_PATTERN_LENGTH)
    different_from: str | None = Field(default=None, description="Another setting of the same item.")
    outside: SettingReference | None = Field(default=None, description="The folder must be in none of those.")

    @field_validator("matches", "not_matches")
    @classmethod
    def validate_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def validate_exactly_one(self) -> Self:
        if len(self.model_fields_set & set(Expectation.model_fields)) != 1:
            raise ValueError(f"give one of {', '.join(Expectation.model_fields)}")
        return self

    def holds(self, value: Any, entry: SettingsEntry, by_area: SettingsByArea) -> bool:
        """Whether a value meets the expectation. A value of another type does not."""
        (operator,) = self.model_fields_set & set(Expectation.model_fields)
        expected, normalized = getattr(self, operator), normalize(value)
        match operator:
            case "equals":
                return settings_equal(value, expected)
            case "one_of":
                return any(settings_equal(value, one) for one in expected)
            case "at_least":
                return _is_number(normalized) and normalized >= expected
            case "at_most":
                return _is_number(normalized) and normalized <= expected
            case "between":
                return _is_number(normalized) and expected[0] <= normalized <= expected[1]
            case "empty":
                return (value in (None, "", [], {})) is expected
            case "matches":
                return re.search(expected, _text(value)) is not None
            case "not_matches":
                return re.search(expected, _text(value)) is None
            case "different_from":
                return not settings_equal(value, entry.values.get(expected))
            case _:
                folders = [other.values.get(expected.setting) for other in by_area.get(expected.area, [])]
                return not any(_is_inside(_text(value), _text(folder)) for folder in folders)

    @property
    def areas(self) -> set[str]:
        """The other areas that must be read."""
        return {self.outside.area} if self.outside else set()


class Condition(Expectation):
    """A rule applies only if this holds: for the item itself, or for any item of another area."""

    area: str | None = None
    setting: str

    def is_met(self, entry: SettingsEntry, by_area: SettingsByArea) -> bool:
        entries = [entry] if self.area is None else by_area.get(self.area, [])
        return any(
            self.setting in candidate.values and self.holds(candidate.values[self.setting], candidate, by_area)
            for candidate in entries
        )

    @property
    def areas(self) -> set[str]:
        return super().areas | ({self.area} if self.area else set())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _text(value: Any) -> str:
    return "" if value is None else ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _is_inside(path: str, folder: str) -> bool:
    path, folder = path.rstrip("/\\"), folder.rstrip("/\\")
    return bool(folder) and (path == folder or path.startswith((f"{folder}/", f"{folder}\\")))
