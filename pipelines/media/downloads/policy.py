"""Decide what to do about a failed or stuck download: a pure function of the case, its history and the policy.

not stuck yet, or waiting                              nothing
protected by a tag, or needs a person                  leave
failed, and no service has chosen it                   retry, up to max_retries; then give_up
failed, and the service that chose it did not notice   mark_failed: it is blocklisted, another one is searched
failed or stuck in the queue of that service           replace: remove, blocklist, search for another one
stuck, and no service can replace it                   report
too soon after the last action, or too many actions    wait
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from pydantic import ConfigDict

from cluster.services.capabilities.download_tracking import ActiveState
from cluster.settings import RecoverySettings

Action = Literal["retry", "mark_failed", "replace"]
Verdict = Literal["retry", "mark_failed", "replace", "remove_folder", "report", "give_up", "leave", "wait"]
ACTIONS: frozenset[Verdict] = frozenset({"retry", "mark_failed", "replace", "remove_folder"})
"""The decisions that change something outside of Forgearr."""
HOUR = timedelta(hours=1)
RETRY_SOON = HOUR / 12


class RecoveryPolicy(RecoverySettings):
    """What may be done about downloads that fail or are stuck."""

    model_config = ConfigDict(strict=True)


@dataclass(frozen=True)
class RecoveryCase:
    """A download, and the services that could act on it."""

    state: str  # failed, blocked or running
    strikes: int
    stalled_since: datetime  # its last progress, or when it failed
    reason: str = ""
    tags: tuple[str, ...] = ()
    retried_by: str | None = None  # the service that can download it again
    chosen_by: str | None = None  # the service that selected it, if known
    replaced_by: str | None = None  # the service that has it in its queue, and can find another one
    is_marked: bool = False  # whether `chosen_by` knows that it has ended
    unsure: str | None = None  # a service that did not answer


@dataclass(frozen=True)
class History:
    """Earlier actions."""

    retries: int = 0  # of this download, or of one with the same title
    last_at: datetime | None = None
    actions_last_hour: int = 0  # on all downloads
    has_unfinished: bool = False  # whether the outcome of an action is unknown


@dataclass(frozen=True)
class Decision:
    verdict: Verdict
    reason: str
    again_at: datetime | None = None  # when to decide again; None: when something changes


def next_strikes(
    strikes_before: int,
    state: ActiveState,
    bytes_left_before: int | None,
    bytes_left: int | None,
    is_transferring: bool,
) -> int:
    """The number of polls in a row, including this one, without the progress that should have been there."""
    if state in {"failed", "blocked"}:
        return strikes_before + 1
    if state != "running" or not is_transferring:
        return 0  # the cause is not this download
    return (
        strikes_before + 1
        if bytes_left_before is not None and bytes_left is not None and bytes_left >= bytes_left_before
        else 0
    )


def needs_decision(policy: RecoveryPolicy, state: str, strikes: int, stalled_since: datetime, at: datetime) -> bool:
    """Whether a download has failed, or has been stuck for long enough."""
    if state == "failed":
        return True
    is_stuck = strikes >= policy.strikes and at - stalled_since >= timedelta(minutes=policy.stuck_minutes)
    return state in {"blocked", "running"} and is_stuck


def veto_reason(policy: RecoveryPolicy, tags: Iterable[str], reason: str = "") -> str | None:
    """The reason why a download must be left alone, if there is one."""
    protected = {tag.casefold() for tag in policy.protected_tags} & {tag.casefold() for tag in tags}
    if protected:
        return f"protected by '{min(protected)}'"
    needs_person = any(text.casefold() in reason.casefold() for text in policy.leave_messages)
    return f"needs a person: {reason}" if needs_person else None


def decide(policy: RecoveryPolicy, case: RecoveryCase, history: History, at: datetime) -> Decision:
    if why := veto_reason(policy, case.tags, case.reason):
        return Decision("leave", why)
    if case.unsure is not None:
        return Decision("wait", f"{case.unsure} does not answer", at + RETRY_SOON)
    if history.has_unfinished:
        return Decision("wait", "the outcome of the last action is unknown", at + RETRY_SOON)
    decision = _ideal_decision(policy, case, history, at)
    if decision.verdict not in ACTIONS:
        return decision
    cooldown_ends = history.last_at and history.last_at + timedelta(minutes=policy.cooldown_minutes)
    if cooldown_ends is not None and cooldown_ends > at:
        return Decision("wait", f"{decision.verdict} waits for the end of the cooldown", cooldown_ends)
    if history.actions_last_hour >= policy.max_per_hour:
        return Decision("wait", f"{decision.verdict} waits: max_per_hour is reached", at + RETRY_SOON)
    return decision


def _ideal_decision(policy: RecoveryPolicy, case: RecoveryCase, history: History, at: datetime) -> Decision:
    """The decision without regard to cooldowns and limits."""
    detail = f": {case.reason}" if case.reason else ""
    if case.state != "failed":
        if case.replaced_by is None:
            return Decision("report", f"stuck, and no service is known that could replace it{detail}")
        return Decision("replace", f"stuck in {case.strikes} polls in a row{detail}")
    if case.chosen_by is None:
        if case.retried_by is None or history.retries >= policy.max_retries:
            return Decision("give_up", f"failed after {history.retries} retries{detail}")
        return Decision("retry", f"failed, retry {history.retries + 1} of {policy.max_retries}{detail}")
    grace_ends = case.stalled_since + timedelta(minutes=policy.grace_minutes)
    if case.is_marked:
        return Decision("leave", f"{case.chosen_by} knows that it failed, and handles it")
    if grace_ends > at:
        return Decision("wait", f"{case.chosen_by} may still handle it", grace_ends)
    if case.replaced_by is not None:
        return Decision("replace", f"failed, and {case.chosen_by} has not handled it{detail}")
    return Decision("mark_failed", f"failed, and {case.chosen_by} has not noticed{detail}")
