"""Apply rules to settings that were read. Pure functions: nothing is requested and nothing is stored."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.logs import redact
from cluster.services.capabilities.settings import SettingsEntry, settings_equal
from pipelines.media.audit.conditions import SettingsByArea
from pipelines.media.audit.rules import Rule

MAX_STORED_CHARACTERS = 4000
MAX_EXCERPT_CHARACTERS = 500
MAX_LISTED_ITEMS = 50
MAX_NAME_LENGTH = 300


@dataclass(frozen=True)
class Finding:
    """A setting that does not meet a rule."""

    rule: Rule
    entry: str  # the key of the item in its area; empty: the only one, or all of them
    entry_name: str
    current: Any  # as it may be stored and shown
    is_exact: bool = True  # whether `current` is the full value, and not shortened or redacted
    reference: str | None = None

    @property
    def by_hand(self) -> str | None:
        """Why this must be done by hand, or what to do; None if it can be applied."""
        if not self.rule.apply.is_by_hand and not self.is_exact:
            return "The current value could not be restored, because it is too long or contains a secret."
        return self.rule.apply.by_hand


def evaluate_rules(rules: Iterable[Rule], by_area: SettingsByArea) -> list[Finding]:
    """All findings. A rule is skipped if this version of the service lacks its area or setting."""
    return [finding for rule in rules if rule.area in by_area for finding in _evaluate_rule(rule, by_area)]


def to_storable(value: Any) -> tuple[Any, bool]:
    """A value as it may be stored, shown and logged, and whether that is still the full value."""
    if isinstance(value, list) and all(isinstance(part, str | int | float | bool | None) for part in value):
        parts = [to_storable(part) for part in value[:MAX_LISTED_ITEMS]]
        stored = [part for part, _ in parts]
        return stored, len(value) <= MAX_LISTED_ITEMS and all(is_exact for _, is_exact in parts)
    if isinstance(value, str):
        redacted = redact(value)
        return (
            (redacted, redacted == value)
            if len(redacted) <= MAX_STORED_CHARACTERS
            else (redacted[:MAX_EXCERPT_CHARACTERS], False)
        )
    if value is None or isinstance(value, bool) or _is_storable_number(value):
        return value, True
    return redact(json.dumps(value, default=str))[:MAX_EXCERPT_CHARACTERS], False


def _evaluate_rule(rule: Rule, by_area: SettingsByArea) -> list[Finding]:
    if rule.when and rule.when.area and not rule.when.is_met(SettingsEntry("", "", {}), by_area):
        return []
    entries = [
        entry
        for entry in by_area[rule.area]
        if all(settings_equal(entry.values.get(name), expected) for name, expected in rule.where.items())
        and (rule.when is None or rule.when.is_met(entry, by_area))
    ]
    failing = [
        entry
        for entry in entries
        if rule.setting in entry.values and not rule.expect.holds(entry.values[rule.setting], entry, by_area)
    ]
    match rule.over:
        case "each":
            return [_entry_finding(rule, entry) for entry in {entry.key: entry for entry in failing}.values()]
        case "some":
            # If an item lacks the setting, it may be the one that meets the expectation.
            known = [entry for entry in entries if rule.setting in entry.values]
            return (
                [_combined_finding(rule, failing)] if len(failing) == len(known) and len(known) == len(entries) else []
            )
        case "all":
            return [_combined_finding(rule, failing)] if failing else []


def _entry_finding(rule: Rule, entry: SettingsEntry) -> Finding:
    current, is_exact = to_storable(entry.values[rule.setting])
    reference = entry.values.get(rule.reference_setting) if rule.reference_setting else None
    if not isinstance(reference, str) or not reference.startswith("https://"):
        reference = None
    name, _ = to_storable(entry.name[:MAX_NAME_LENGTH])
    return Finding(
        rule, entry.key[:MAX_NAME_LENGTH], name, current, is_exact, reference and redact(reference)[:MAX_NAME_LENGTH]
    )


def _combined_finding(rule: Rule, failing: Sequence[SettingsEntry]) -> Finding:
    current = [
        f"{entry.name[:MAX_NAME_LENGTH]}: {to_storable(entry.values[rule.setting])[0]}"
        for entry in failing[:MAX_LISTED_ITEMS]
    ]
    return Finding(rule, "", "", [redact(line) for line in current], is_exact=False)


def _is_storable_number(value: Any) -> bool:
    """JSON has numbers that databases cannot store."""
    if isinstance(value, int):
        return abs(value) < 2**63
    return isinstance(value, float) and abs(value) < 1e300
