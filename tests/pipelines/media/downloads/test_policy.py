"""The decisions of the recovery policy, without any service."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, strategies

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
    columns: dict[str, Any] = {"state": state, "strikes": 5, "stalled_since": LONG_AGO, **values}
    return RecoveryCase(**columns)


NATIVE: dict[str, Any] = {"retried_by": "Usenet"}
CHOSEN: dict[str, Any] = {"chosen_by": "TV"}
QUEUED: dict[str, Any] = {"chosen_by": "TV", "replaced_by": "TV"}


@pytest.mark.parametrize(
    ("recovery_case", "history", "verdict"),
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
def test_each_case_has_its_verdict(recovery_case: RecoveryCase, history: History, verdict: str) -> None:
    decision = decide(policy(protected_tags=["Keep"]), recovery_case, history, AT)
    assert (decision.verdict, bool(decision.reason)) == (verdict, True)


def test_a_wait_has_the_time_of_the_next_decision() -> None:
    decision = decide(policy(), case(**NATIVE), History(last_at=AT), AT)
    assert decision.again_at == AT + timedelta(hours=1)
    assert decide(policy(), case(**CHOSEN, stalled_since=AT), History(), AT).again_at == AT + timedelta(minutes=10)


cases = strategies.builds(
    RecoveryCase,
    state=strategies.sampled_from(["failed", "blocked", "running"]),
    strikes=strategies.integers(0, 50),
    stalled_since=strategies.just(LONG_AGO) | strategies.just(AT),
    reason=strategies.text(max_size=20),
    tags=strategies.lists(strategies.sampled_from(["keep", "KEEP", "other"])).map(tuple),
    retried_by=strategies.none() | strategies.just("Usenet"),
    chosen_by=strategies.none() | strategies.just("TV"),
    replaced_by=strategies.none() | strategies.just("TV"),
    is_marked=strategies.booleans(),
    unsure=strategies.none() | strategies.just("TV"),
)
histories = strategies.builds(
    History,
    retries=strategies.integers(0, 5),
    last_at=strategies.none() | strategies.integers(0, 200).map(lambda minutes: AT - timedelta(minutes=minutes)),
    actions_last_hour=strategies.integers(0, 20),
)


@given(
    recovery_case=cases,
    history=histories,
    max_per_hour=strategies.integers(0, 12),
    cooldown=strategies.integers(0, 100),
)
def test_no_action_violates_the_policy(
    recovery_case: RecoveryCase, history: History, max_per_hour: int, cooldown: int
) -> None:
    decision = decide(
        policy(protected_tags=["Keep"], max_per_hour=max_per_hour, cooldown_minutes=cooldown),
        recovery_case,
        history,
        AT,
    )
    if decision.verdict not in ACTIONS:
        return
    assert history.actions_last_hour < max_per_hour
    assert history.last_at is None or history.last_at + timedelta(minutes=cooldown) <= AT
    assert not {"keep", "KEEP"} & set(recovery_case.tags)
    assert recovery_case.unsure is None
    assert decision.verdict != "retry" or (
        recovery_case.state == "failed" and recovery_case.chosen_by is None and history.retries < 2
    )


@pytest.mark.parametrize(
    ("state", "bytes_left_before", "bytes_left", "is_transferring", "strikes"),
    [
        ("running", 100, 100, True, 4),
        ("running", 100, 99, True, 0),
        ("running", 100, 100, False, 0),  # no download makes progress
        ("running", None, 100, True, 0),
        ("waiting", 100, 100, True, 0),  # it waits in the queue
        ("processing", 0, 0, True, 0),
        ("blocked", 0, 0, False, 4),
        ("failed", None, None, False, 4),
    ],
)
def test_only_a_stalled_download_gets_strikes(
    state: Any, bytes_left_before: int | None, bytes_left: int, is_transferring: bool, strikes: int
) -> None:
    assert next_strikes(3, state, bytes_left_before, bytes_left, is_transferring) == strikes


@pytest.mark.parametrize(
    ("state", "strikes", "minutes", "is_decided"),
    [
        ("failed", 1, 0, True),
        ("running", 5, 60, True),
        ("running", 4, 60, False),
        ("running", 5, 59, False),
        ("blocked", 5, 60, True),
        ("waiting", 500, 6000, False),
    ],
)
def test_a_download_is_decided_on_after_enough_strikes_and_time(
    state: str, strikes: int, minutes: int, is_decided: bool
) -> None:
    assert needs_decision(policy(), state, strikes, AT - timedelta(minutes=minutes), AT) is is_decided
