"""What is done about a download that has failed, or does not get on: a function of what is known of it, and the policy.

not stuck yet, waiting for its turn           nothing
protected, or a person's matter               leave
failed, and nobody knows it                   retry, some times; then give_up
failed, and who chose it has not noticed      mark_failed: that blocklists it, and another one is searched
stuck or failed with who chose it             replace: remove, blocklist, search for another one
stuck, and nobody knows it                    report
too soon after the last time, or too many     wait
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
"""What changes something, outside of Forgearr."""
HOUR = timedelta(hours=1)
RETRY_SOON = HOUR / 12


class RecoveryPolicy(RecoverySettings):
    """What may be done about downloads that fail, or do not get on."""

    model_config = ConfigDict(strict=True)


@dataclass(frozen=True)
class RecoveryCase:
    """A download, and who could do something about it."""

    state: str  # failed, blocked or running
    strikes: int
    stalled_since: datetime  # since when it has not moved, or when it failed
    reason: str = ""
    tags: tuple[str, ...] = ()
    retried_by: str | None = None  # the service that can fetch it once more
    chosen_by: str | None = None  # the service that had it fetched, as far as that is known
    replaced_by: str | None = None  # the service in whose queue it is, and which can find another one
    is_marked: bool = False  # whether `chosen_by` knows of its end
    unsure: str | None = None  # a service that could not be asked


@dataclass(frozen=True)
class History:
    """What was done before."""

    retries: int = 0  # of this download, or of one of its title
    last_at: datetime | None = None
    actions_last_hour: int = 0  # actions of all sorts
    has_unfinished: bool = False  # whether nobody knows yet what came of the last one


@dataclass(frozen=True)
class Decision:
    verdict: Verdict
    reason: str
    again_at: datetime | None = None  # when to think about it anew; None: not before something changes


def next_strikes(
    strikes_before: int,
    state: ActiveState,
    bytes_left_before: int | None,
    bytes_left: int | None,
    is_transferring: bool,
) -> int:
    """How many looks in a row, this one included, have seen no progress that there should have been."""
    if state in {"failed", "blocked"}:
        return strikes_before + 1
    if state != "running" or not is_transferring:
        return 0  # it waits for something that is not its fault
    return (
        strikes_before + 1
        if bytes_left_before is not None and bytes_left is not None and bytes_left >= bytes_left_before
        else 0
    )


def needs_decision(policy: RecoveryPolicy, state: str, strikes: int, stalled_since: datetime, at: datetime) -> bool:
    """Whether there is something to decide."""
    if state == "failed":
        return True
    is_stuck = strikes >= policy.strikes and at - stalled_since >= timedelta(minutes=policy.stuck_minutes)
    return state in {"blocked", "running"} and is_stuck


def veto_reason(policy: RecoveryPolicy, tags: Iterable[str], reason: str = "") -> str | None:
    """Why nothing may be done about a download, whatever becomes of it."""
    protected = {tag.casefold() for tag in policy.protected_tags} & {tag.casefold() for tag in tags}
    if protected:
        return f"protected by '{min(protected)}'"
    needs_person = any(text.casefold() in reason.casefold() for text in policy.leave_messages)
    return f"a matter for a person: {reason}" if needs_person else None


def decide(policy: RecoveryPolicy, case: RecoveryCase, history: History, at: datetime) -> Decision:
    if why := veto_reason(policy, case.tags, case.reason):
        return Decision("leave", why)
    if case.unsure is not None:
        return Decision("wait", f"{case.unsure} cannot be asked about it", at + RETRY_SOON)
    if history.has_unfinished:
        return Decision("wait", "until it is known what came of the last time", at + RETRY_SOON)
    decision = _ideal_decision(policy, case, history, at)
    if decision.verdict not in ACTIONS:
        return decision
    cooldown_ends = history.last_at and history.last_at + timedelta(minutes=policy.cooldown_minutes)
    if cooldown_ends is not None and cooldown_ends > at:
        return Decision("wait", f"to {decision.verdict} it, until the cooldown is over", cooldown_ends)
    if history.actions_last_hour >= policy.max_per_hour:
        return Decision("wait", f"to {decision.verdict} it: this hour has seen enough actions", at + RETRY_SOON)
    return decision


def _ideal_decision(policy: RecoveryPolicy, case: RecoveryCase, history: History, at: datetime) -> Decision:
    """What would be right, if it were not too soon or too much."""
    detail = f": {case.reason}" if case.reason else ""
    if case.state != "failed":
        if case.replaced_by is None:
            return Decision("report", f"stuck, and nobody is known who could find another one{detail}")
        return Decision("replace", f"stuck for {case.strikes} looks in a row{detail}")
    if case.chosen_by is None:
        if case.retried_by is None or history.retries >= policy.max_retries:
            return Decision("give_up", f"failed after {history.retries} retries{detail}")
        return Decision("retry", f"failed, retry {history.retries + 1} of {policy.max_retries}{detail}")
    grace_ends = case.stalled_since + timedelta(minutes=policy.grace_minutes)
    if case.is_marked:
        return Decision("leave", f"{case.chosen_by} knows of it, and looks for another one")
    if grace_ends > at:
        return Decision("wait", f"for {case.chosen_by} to deal with it", grace_ends)
    if case.replaced_by is not None:
        return Decision("replace", f"failed, and {case.chosen_by} has not dealt with it{detail}")
    return Decision("mark_failed", f"failed, and {case.chosen_by} has not noticed{detail}")
