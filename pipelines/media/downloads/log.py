"""The log of recoveries, with each decision about a download and its outcome, and the policy in force.

An action is stored before it is taken. If the worker dies, the row stays `begun`, and the next worker finds out what
happened.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import BigInteger, Boolean, ForeignKey, Integer, String, Text, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster.db import Base, Database, delete_rows, now
from cluster.settings import get_settings
from pipelines.media.downloads.policy import ACTIONS, HOUR, Decision, History, RecoveryPolicy, Verdict
from pipelines.media.downloads.tables import FollowedDownload

RecoveryOutcome = Literal[
    "begun",  # decided, and perhaps done, if its worker died
    "done",
    "failed",
    "dry_run",  # not done, because of a dry run
    "overtaken",  # no longer needed or allowed
    "noted",  # the decision was no action
]
SECOND = timedelta(seconds=1)
POLICY_ID = 1
"""The id of the row that holds the policy."""


class Recovery(Base):
    __tablename__ = "recoveries"

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    at: Mapped[datetime] = mapped_column(default=now, index=True)
    service_id: Mapped[int | None] = mapped_column(ForeignKey("services.id", ondelete="SET NULL"))
    service: Mapped[str] = mapped_column(String(100))  # the name of the service at that time
    item: Mapped[str] = mapped_column(Text)  # the service's id of the download, or the path of a leftover folder
    title: Mapped[str] = mapped_column(Text)
    content: Mapped[list[str]] = mapped_column(default=list)
    stood_at: Mapped[int | None] = mapped_column(BigInteger)  # remaining bytes of a stuck download at the decision
    decision: Mapped[Verdict] = mapped_column(String(20))
    reason: Mapped[str] = mapped_column(Text)
    policy: Mapped[dict[str, Any]]  # at the decision
    dry_run: Mapped[bool] = mapped_column(Boolean)
    outcome: Mapped[RecoveryOutcome] = mapped_column(String(20), index=True)
    removed: Mapped[bool] = mapped_column(Boolean, default=False)  # the first step of a replacement is done
    searched: Mapped[bool] = mapped_column(Boolean, default=False)
    new_item: Mapped[str | None] = mapped_column(String(300))  # the service's id after a retry
    error: Mapped[str | None] = mapped_column(Text)
    again_at: Mapped[datetime | None]  # when to check it again, if the service did not answer
    ended_at: Mapped[datetime | None]
    recovered_at: Mapped[datetime | None]  # when the download, or a replacement, succeeded
    job_id: Mapped[str] = mapped_column(String(40))


class RecoveryPolicyOverride(Base):
    """A policy that an administrator has set, which overrides the settings."""

    __tablename__ = "recovery_policy"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    policy: Mapped[dict[str, Any]]
    changed_by: Mapped[str] = mapped_column(String(200))
    changed_at: Mapped[datetime] = mapped_column(default=now)


async def current_policy(session: AsyncSession) -> tuple[RecoveryPolicy, RecoveryPolicyOverride | None]:
    """The policy in force, and the row of the override, if there is one."""
    override = await session.get(RecoveryPolicyOverride, POLICY_ID)
    if override is not None:
        # The row may be of an older Forgearr: new fields get their defaults, removed ones are ignored.
        defaults = get_settings().recovery.model_dump()
        known = {name: value for name, value in override.policy.items() if name in defaults}
        return RecoveryPolicy.model_validate({**defaults, **known}), override
    return RecoveryPolicy.model_validate(get_settings().recovery.model_dump()), None


async def set_policy(session: AsyncSession, policy: RecoveryPolicy, by: str) -> RecoveryPolicyOverride:
    """Override the settings with this policy. Settled cases are decided again."""
    override = await session.merge(
        RecoveryPolicyOverride(id=POLICY_ID, policy=policy.model_dump(), changed_by=by, changed_at=now())
    )
    await _reset_settled(session)
    return override


async def reset_policy(session: AsyncSession) -> None:
    """Remove the override. Settled cases are decided again."""
    await session.execute(delete(RecoveryPolicyOverride))
    await _reset_settled(session)


async def load_history(session: AsyncSession, service_id: int, item: str, title: str, at: datetime) -> History:
    """Earlier actions on a download, or on one of the same title, and the number of all actions in the last hour."""
    is_action = Recovery.decision.in_(ACTIONS) & (Recovery.dry_run.is_(False)) & (Recovery.outcome != "overtaken")
    same_download = (
        is_action & (Recovery.service_id == service_id) & or_(Recovery.item == item, Recovery.title == title)
    )
    retries = await session.scalar(select(func.count()).where(same_download, Recovery.decision == "retry"))
    last_at = await session.scalar(select(func.max(Recovery.at)).where(same_download))
    last_hour = await session.scalar(select(func.count()).where(is_action, Recovery.at > at - HOUR))
    begun = await session.scalar(select(func.count()).where(same_download, Recovery.outcome == "begun"))
    return History(retries or 0, last_at, last_hour or 0, bool(begun))


async def record_decision(session: AsyncSession, recovery: Recovery) -> bool:
    """Store a decision, unless it repeats the last one about the same download. Returns whether it was stored."""
    if recovery.outcome != "begun":
        last = await session.scalar(
            select(Recovery)
            .where(Recovery.service_id == recovery.service_id, Recovery.item == recovery.item)
            .order_by(Recovery.id.desc())
            .limit(1)
        )
        if last is not None and _is_same_decision(last, recovery):
            return False
    session.add(recovery)
    await session.flush()
    return True


async def unfinished_recoveries(session: AsyncSession, at: datetime) -> Sequence[Recovery]:
    """Actions with an unknown outcome: their worker died, or the service did not answer."""
    begun = select(Recovery).where(
        Recovery.outcome == "begun", or_(Recovery.again_at.is_(None), Recovery.again_at <= at)
    )
    return (await session.scalars(begun.order_by(Recovery.id))).all()


async def mark_recovered(
    session: AsyncSession, service_id: int, titles: Iterable[str], content: Iterable[str], at: datetime
) -> int:
    """Mark the actions whose downloads have now succeeded, matched by title or by content. Returns their number."""
    seen_titles, seen_content = set(titles), {one for one in content if not one.startswith("series:")}
    open_recoveries = await session.scalars(
        select(Recovery).where(
            Recovery.service_id == service_id,
            Recovery.outcome.in_(["begun", "done"]),
            Recovery.decision.in_(["retry", "replace", "mark_failed"]),
            Recovery.recovered_at.is_(None),
            Recovery.at < at + SECOND,  # the times of services are in whole seconds
        )
    )
    recovered = [one for one in open_recoveries if one.title in seen_titles or seen_content & set(one.content)]
    for one in recovered:
        one.recovered_at = at
    return len(recovered)


async def outcome_counts(session: AsyncSession, since: datetime) -> dict[str, int]:
    """The numbers of actions since then, by their kind and outcome."""
    done = (Recovery.outcome == "done") & (Recovery.ended_at > since)
    counts = {
        "retried": done & (Recovery.decision == "retry"),
        "removed": done & (Recovery.decision.in_(["replace", "remove_folder"])),
        "marked_failed": done & (Recovery.decision == "mark_failed"),
        "searched": done & Recovery.searched,
        "given_up": (Recovery.decision == "give_up") & (Recovery.at > since),
        "failed": (Recovery.outcome == "failed") & (Recovery.ended_at > since),
        "recovered": Recovery.recovered_at > since,
    }
    return {
        name: await session.scalar(select(func.count()).where(condition)) or 0 for name, condition in counts.items()
    }


async def remove_old(database: Database) -> int:
    """Delete decisions that are older than `media.history_days`."""
    async with database.transaction() as session:
        oldest = now() - timedelta(days=get_settings().media.history_days)
        old = delete(Recovery).where(Recovery.at < oldest, Recovery.outcome != "begun")
        return await delete_rows(session, old)


def build_recovery(
    decision: Decision, policy: RecoveryPolicy, *, execute: bool, at: datetime, job_id: str, **columns: Any
) -> Recovery:
    """The row of a decision."""
    is_action = decision.verdict in ACTIONS
    return Recovery(
        at=at,
        decision=decision.verdict,
        reason=decision.reason,
        policy=policy.model_dump(exclude={"protected_tags", "leave_messages"}),
        dry_run=not execute,
        outcome=("begun" if execute else "dry_run") if is_action else "noted",
        job_id=job_id,
        **columns,
    )


async def _reset_settled(session: AsyncSession) -> None:
    unsolved = FollowedDownload.state.in_(["failed", "blocked", "running"]) & FollowedDownload.ended_at.is_(None)
    failed = FollowedDownload.state == "failed"
    await session.execute(update(FollowedDownload).where(unsolved | failed).values(settled=False, decide_at=None))


def _is_same_decision(one: Recovery, other: Recovery) -> bool:
    return (one.decision, one.reason, one.dry_run) == (other.decision, other.reason, other.dry_run)
