"""What is decided about a download: the policy alone, without any service."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from cluster.settings import load_settings
from pipelines.media.downloads.policy import (
    ACTIONS,
    History,
    RecoveryCase,
    RecoveryPolicy,
    decide,
    needs_decision,
    next_strikes,
)

AT = datetime(2026, 1, 8, 10, 30, tzinfo=UTC)
LONG_AGO = AT - timedelta(days=2)
DEFAULTS = load_settings().settings.recovery.model_dump()


def policy(**values: Any) -> RecoveryPolicy:
    return RecoveryPolicy.model_validate({**DEFAULTS, **values})


def case(state: str = "failed", **values: Any) -> RecoveryCase:
    told: dict[str, Any] = {"state": state, "strikes": 5, "stalled_since": LONG_AGO, **values}
    return RecoveryCase(**told)


NATIVE: dict[str, Any] = {"retried_by": "Usenet"}
CHOSEN: dict[str, Any] = {"chosen_by": "TV"}
QUEUED: dict[str, Any] = {"chosen_by": "TV", "replaced_by": "TV"}


@pytest.mark.parametrize(
    ("what", "past", "verdict"),
    [
        (case(**NATIVE), History(), "retry"),
        (case(**NATIVE), History(retries=1), "retry"),
        (case(**NATIVE), History(retries=2), "give_up"),
        (case(), History(), "give_up"),
        (case(**CHOSEN), History(), "mark_failed"),
        (case(**CHOSEN, is_marked=True), History(), "leave"),
        (case(**CHOSEN, stalled_since=AT), History(), "wait"),
        (case(**QUEUED), History(), "replace"),
        (case("blocked", **QUEUED), History(), "replace"),
        (case("blocked", **QUEUED, reason="Not enough free space"), History(), "leave"),
        (case("running", **QUEUED), History(), "replace"),
        (case("running", **NATIVE), History(), "report"),
        (case(**NATIVE, unsure="TV"), History(), "wait"),
        (case(**NATIVE), History(last_at=AT - timedelta(minutes=59)), "wait"),
        (case(**NATIVE), History(last_at=AT - timedelta(minutes=61)), "retry"),
        (case(**NATIVE), History(actions_last_hour=10), "wait"),
    ],
)
def test_each_case_has_its_answer(what: RecoveryCase, past: History, verdict: str) -> None:
    decision = decide(policy(protected_tags=["Keep"]), what, past, AT)
    assert (decision.verdict, bool(decision.reason)) == (verdict, True)


def test_a_wait_says_until_when() -> None:
    cooled = decide(policy(), case(**NATIVE), History(last_at=AT), AT)
    assert cooled.again_at == AT + timedelta(hours=1)
    assert decide(policy(), case(**CHOSEN, stalled_since=AT), History(), AT).again_at == AT + timedelta(minutes=10)


cases = some.builds(
    RecoveryCase,
    state=some.sampled_from(["failed", "blocked", "running"]),
    strikes=some.integers(0, 50),
    stalled_since=some.just(LONG_AGO) | some.just(AT),
    reason=some.text(max_size=20),
    tags=some.lists(some.sampled_from(["keep", "KEEP", "other"])).map(tuple),
    retried_by=some.none() | some.just("Usenet"),
    chosen_by=some.none() | some.just("TV"),
    replaced_by=some.none() | some.just("TV"),
    is_marked=some.booleans(),
    unsure=some.none() | some.just("TV"),
)
pasts = some.builds(
    History,
    retries=some.integers(0, 5),
    last_at=some.none() | some.integers(0, 200).map(lambda minutes: AT - timedelta(minutes=minutes)),
    actions_last_hour=some.integers(0, 20),
)


@given(what=cases, past=pasts, cap=some.integers(0, 12), cooldown=some.integers(0, 100))
def test_nothing_is_done_that_the_policy_forbids(what: RecoveryCase, past: History, cap: int, cooldown: int) -> None:
    decision = decide(policy(protected_tags=["Keep"], max_per_hour=cap, cooldown_minutes=cooldown), what, past, AT)
    if decision.verdict not in ACTIONS:
        return
    assert past.actions_last_hour < cap
    assert past.last_at is None or past.last_at + timedelta(minutes=cooldown) <= AT
    assert not {"keep", "KEEP"} & set(what.tags)
    assert what.unsure is None
    assert decision.verdict != "retry" or (what.state == "failed" and what.chosen_by is None and past.retries < 2)


@pytest.mark.parametrize(
    ("state", "before", "left", "moves", "strikes"),
    [
        ("running", 100, 100, True, 4),
        ("running", 100, 99, True, 0),
        ("running", 100, 100, False, 0),  # nothing comes in at all
        ("running", None, 100, True, 0),
        ("waiting", 100, 100, True, 0),  # its turn has not come
        ("processing", 0, 0, True, 0),
        ("blocked", 0, 0, False, 4),
        ("failed", None, None, False, 4),
    ],
)
def test_who_waits_gets_no_strikes(state: Any, before: int | None, left: int, moves: bool, strikes: int) -> None:
    assert next_strikes(3, state, before, left, moves) == strikes


@pytest.mark.parametrize(
    ("state", "strikes", "minutes", "decided"),
    [
        ("failed", 1, 0, True),
        ("running", 5, 60, True),
        ("running", 4, 60, False),
        ("running", 5, 59, False),
        ("blocked", 5, 60, True),
        ("waiting", 500, 6000, False),
    ],
)
def test_stuck_is_who_has_strikes_for_long_enough(state: str, strikes: int, minutes: int, decided: bool) -> None:
    assert needs_decision(policy(), state, strikes, AT - timedelta(minutes=minutes), AT) is decided
