"""What the rules find in the settings of a service, as they were read. Nobody is asked here, and nothing is kept."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.logs import redact
from cluster.services.capabilities.settings import Entry, same
from pipelines.media.audit.conditions import Read
from pipelines.media.audit.rules import Rule

KEPT_CHARACTERS = 4000
SHOWN_CHARACTERS = 500
SHOWN_THINGS = 50
WORDS_MAX = 300


@dataclass(frozen=True)
class Finding:
    """A setting that is not as a rule expects it."""

    rule: Rule
    entry: str  # the key of the thing in its area; empty: the only one, or all of them
    entry_name: str
    current: Any  # as it may be kept and shown
    whole: bool = True  # whether `current` is the value itself, and not only what may be shown of it
    reference: str | None = None

    @property
    def by_hand(self) -> str | None:
        """Why this cannot be applied."""
        if not self.rule.apply.is_by_hand and not self.whole:
            return "The present value could not be restored, because it is too long or has a secret in it."
        return self.rule.apply.by_hand


def find(rules: Iterable[Rule], read: Read) -> list[Finding]:
    """What is not as it should be. A rule whose area or setting this version of a service does not have is left out."""
    return [finding for rule in rules if rule.area in read for finding in _of_rule(rule, read)]


def keepable(value: Any) -> tuple[Any, bool]:
    """A value as it may be kept, told and put into a log; and whether that is still the value itself."""
    if isinstance(value, list) and all(isinstance(part, str | int | float | bool | None) for part in value):
        parts = [keepable(part) for part in value[:SHOWN_THINGS]]
        kept = [part for part, _ in parts]
        return kept, len(value) <= SHOWN_THINGS and all(whole for _, whole in parts)
    if isinstance(value, str):
        clean = redact(value)
        return (clean, clean == value) if len(clean) <= KEPT_CHARACTERS else (clean[:SHOWN_CHARACTERS], False)
    if value is None or isinstance(value, bool) or _is_reasonable(value):
        return value, True
    return redact(json.dumps(value, default=str))[:SHOWN_CHARACTERS], False


def _of_rule(rule: Rule, read: Read) -> list[Finding]:
    if rule.when and rule.when.area and not rule.when.met(Entry("", "", {}), read):
        return []
    things = [
        thing
        for thing in read[rule.area]
        if all(same(thing.values.get(name), wanted) for name, wanted in rule.where.items())
        and (rule.when is None or rule.when.met(thing, read))
    ]
    wrong = [
        thing
        for thing in things
        if rule.setting in thing.values and not rule.expect.holds(thing.values[rule.setting], thing, read)
    ]
    match rule.over:
        case "each":
            return [_finding(rule, thing) for thing in {thing.key: thing for thing in wrong}.values()]
        case "some":
            # Of things that do not even have the setting, nobody can say anything.
            known = [thing for thing in things if rule.setting in thing.values]
            return [_of_all(rule, wrong)] if len(wrong) == len(known) and len(known) == len(things) else []
        case "all":
            return [_of_all(rule, wrong)] if wrong else []


def _finding(rule: Rule, thing: Entry) -> Finding:
    current, whole = keepable(thing.values[rule.setting])
    reference = thing.values.get(rule.reference_setting) if rule.reference_setting else None
    if not isinstance(reference, str) or not reference.startswith("https://"):
        reference = None
    name, _ = keepable(thing.name[:WORDS_MAX])
    return Finding(rule, thing.key[:WORDS_MAX], name, current, whole, reference and redact(reference)[:WORDS_MAX])


def _of_all(rule: Rule, wrong: Sequence[Entry]) -> Finding:
    current = [f"{thing.name[:WORDS_MAX]}: {keepable(thing.values[rule.setting])[0]}" for thing in wrong[:SHOWN_THINGS]]
    return Finding(rule, "", "", [redact(line) for line in current], whole=False)


def _is_reasonable(value: Any) -> bool:
    """JSON has numbers that no database takes."""
    if isinstance(value, int):
        return abs(value) < 2**63
    return isinstance(value, float) and abs(value) < 1e300
