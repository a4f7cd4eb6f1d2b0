"""The tables of audits: audits, their findings, recommendations, and changes of settings.

A recommendation is open from the first audit that finds it until it is applied, or until an audit does not find it any
more. The same finding is never open twice.

    open → applied     its value was set
    open → closed      an audit did not find it any more
    applied → open     it was rolled back
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, Select, String, Text, delete, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster.db import Base, Database, Document, delete_rows, now
from cluster.errors import NotFound
from cluster.settings import get_settings
from jobs.sweep import register_sweeper
from pipelines.media.audit.evaluate import Finding

ChangeOutcome = Literal["begun", "applied", "failed", "restored"]
Id = BigInteger().with_variant(Integer, "sqlite")


class RecommendationNotFound(NotFound):
    """There is no such recommendation."""

    code = "RECOMMENDATION_NOT_FOUND"


class AuditNotFound(NotFound):
    """There is no such audit."""

    code = "AUDIT_NOT_FOUND"


class Audit(Base):
    """A finished audit."""

    __tablename__ = "audits"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    at: Mapped[datetime] = mapped_column(index=True)
    services: Mapped[list[str]]  # handles of the audited services
    failed: Mapped[dict[str, Any]]  # errors of services that could not be audited, by handle
    summary: Mapped[dict[str, Any]]  # numbers of findings, by handle
    counts: Mapped[dict[str, Any]]  # numbers of recommendations, by priority
    total: Mapped[int]
    rule_problems: Mapped[list[str]]
    web_search: Mapped[dict[str, Any]]
    created_by: Mapped[str] = mapped_column(String(200))


class Recommendation(Base):
    __tablename__ = "recommendations"
    __table_args__ = (
        Index(
            "uq_recommendations_open",
            "service_id",
            "rule_id",
            "entry",
            unique=True,
            sqlite_where=text("closed_at IS NULL"),
            postgresql_where=text("closed_at IS NULL"),
        ),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    service_id: Mapped[int] = mapped_column(ForeignKey("services.id", ondelete="CASCADE"), index=True)
    rule_id: Mapped[str] = mapped_column(String(100))
    area: Mapped[str] = mapped_column(String(100))
    setting: Mapped[str] = mapped_column(String(200))
    entry: Mapped[str] = mapped_column(String(300))  # the key of the item in its area, if that is a list
    entry_name: Mapped[str] = mapped_column(String(300))
    category: Mapped[str] = mapped_column(String(20))
    priority: Mapped[str] = mapped_column(String(10))
    current_value: Mapped[Any | None] = mapped_column(Document)  # at the last audit
    recommended_value: Mapped[Any | None] = mapped_column(Document)
    by_hand: Mapped[str | None] = mapped_column(Text)  # what a person must do; None: `recommended_value` can be set
    rationale: Mapped[str] = mapped_column(Text)
    explanation: Mapped[str] = mapped_column(Text)
    impact: Mapped[str] = mapped_column(Text)
    references: Mapped[list[str]]
    sources: Mapped[list[str]]  # URLs from a web search
    created_at: Mapped[datetime] = mapped_column(default=now, index=True)
    seen_at: Mapped[datetime] = mapped_column(default=now)  # by the last audit that found it
    closed_at: Mapped[datetime | None]  # None: open
    applied_at: Mapped[datetime | None]
    applied_by: Mapped[str | None] = mapped_column(String(200))


class AuditFinding(Base):
    """A recommendation that an audit has made, or confirmed."""

    __tablename__ = "audit_findings"

    audit_id: Mapped[str] = mapped_column(ForeignKey("audits.id", ondelete="CASCADE"), primary_key=True)
    recommendation_id: Mapped[int] = mapped_column(
        ForeignKey("recommendations.id", ondelete="CASCADE"), primary_key=True, index=True
    )


class SettingChange(Base):
    """A change of a setting. It is stored before the setting is written, so that a crash leaves a record."""

    __tablename__ = "setting_changes"

    id: Mapped[int] = mapped_column(Id, primary_key=True)
    recommendation_id: Mapped[int] = mapped_column(ForeignKey("recommendations.id", ondelete="CASCADE"), index=True)
    previous: Mapped[Any | None] = mapped_column(Document)
    new: Mapped[Any | None] = mapped_column(Document)
    outcome: Mapped[ChangeOutcome] = mapped_column(String(10))
    at: Mapped[datetime] = mapped_column(default=now)
    by: Mapped[str] = mapped_column(String(200))
    restored_at: Mapped[datetime | None]
    restored_by: Mapped[str | None] = mapped_column(String(200))


async def get(session: AsyncSession, recommendation_id: int, *, lock: bool = False) -> Recommendation:
    recommendation = await session.get(Recommendation, recommendation_id, with_for_update=lock)
    if recommendation is None:
        raise RecommendationNotFound(f"Recommendation with ID {recommendation_id} not found")
    return recommendation


def is_open() -> Any:
    return Recommendation.closed_at.is_(None)


def visible_recommendations() -> Select[Recommendation]:
    """The recommendations that are open or applied."""
    return select(Recommendation).where(is_open() | Recommendation.applied_at.is_not(None))


async def save_findings(
    session: AsyncSession, service_id: int, findings: Sequence[Finding], sources: Mapping[str, list[str]], at: datetime
) -> list[Recommendation]:
    """Make the open recommendations of a service those of the current findings."""
    rows = await session.scalars(
        select(Recommendation).where(Recommendation.service_id == service_id, is_open()).with_for_update()
    )
    open_rows = {(row.rule_id, row.entry): row for row in rows}
    # The audit may have read a setting before a recommendation was applied to it.
    applied = await session.execute(
        select(Recommendation.rule_id, Recommendation.entry).where(
            Recommendation.service_id == service_id, Recommendation.applied_at >= at
        )
    )
    applied_since = {(row.rule_id, row.entry) for row in applied.all()}
    saved: list[Recommendation] = []
    for finding in findings:
        row = open_rows.pop((finding.rule.id, finding.entry), None)
        if row is None:
            if (finding.rule.id, finding.entry) in applied_since:
                continue
            row = Recommendation(service_id=service_id, rule_id=finding.rule.id, entry=finding.entry, sources=[])
            row.created_at = at
            session.add(row)
        _fill_row(row, finding)
        row.seen_at = at
        row.sources = sources.get(finding.rule.id, row.sources)
        saved.append(row)
    for row in open_rows.values():
        row.closed_at = at
    await session.flush()
    return saved


async def last_change(session: AsyncSession, recommendation_id: int, *outcomes: ChangeOutcome) -> SettingChange | None:
    return await session.scalar(
        select(SettingChange)
        .where(SettingChange.recommendation_id == recommendation_id, SettingChange.outcome.in_(outcomes))
        .order_by(SettingChange.id.desc())
        .limit(1)
        .with_for_update()
    )


async def applied_counts(session: AsyncSession, audit_ids: Sequence[str]) -> dict[str, int]:
    """The number of recommendations of each audit that are applied now."""
    rows = await session.execute(
        select(AuditFinding.audit_id, func.count())
        .join(Recommendation, Recommendation.id == AuditFinding.recommendation_id)
        .where(AuditFinding.audit_id.in_(audit_ids), Recommendation.applied_at.is_not(None))
        .group_by(AuditFinding.audit_id)
    )
    return {row[0]: row[1] for row in rows.all()}


@register_sweeper("recommendations")
async def remove_old(database: Database) -> int:
    """Delete audits that are older than `audit.history_days`, and closed recommendations that no audit refers to."""
    oldest = now() - timedelta(days=get_settings().audit.history_days)
    async with database.transaction() as session:
        await session.execute(delete(Audit).where(Audit.at < oldest))
        is_referenced = select(AuditFinding).where(AuditFinding.recommendation_id == Recommendation.id).exists()
        ended = Recommendation.closed_at < oldest
        return await delete_rows(session, delete(Recommendation).where(ended, ~is_referenced))


def _fill_row(row: Recommendation, finding: Finding) -> None:
    rule = finding.rule
    row.area, row.setting, row.entry_name = rule.area, rule.setting, finding.entry_name
    row.category, row.priority = rule.category, rule.priority
    row.current_value, row.recommended_value, row.by_hand = finding.current, rule.recommended_value, finding.by_hand
    row.rationale, row.explanation, row.impact = rule.rationale, rule.explanation, rule.impact
    row.references = [*rule.references, *([finding.reference] if finding.reference else [])]
