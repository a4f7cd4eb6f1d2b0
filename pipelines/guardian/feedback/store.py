"""Feedback on answers: store it, and turn it into training prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, Literal, Self, cast
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from sqlalchemy import ColumnElement, Index, Select, String, Text, and_, func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster import identity
from cluster.db import Base, advisory_lock, now
from cluster.db import Sequence as Counter
from cluster.errors import Conflict, NotFound
from cluster.ownership import LOCAL, Principal, require, visible
from cluster.settings import get_settings
from pipelines.training.data import prompts
from pipelines.training.data.messages import Message, Tool
from pipelines.training.data.parsing import first_error_message
from pipelines.training.data.prompts import OrderedJson, Prompt, PromptRequest, Tags
from pipelines.training.models import versions as models_versions
from pipelines.training.models.versions import ModelNotFound

MAX_LEARNED = 1000

Target = Literal["chat_completion", "tool_call", "agent_message", "response"]
Rating = Literal["up", "down"]
Id = Annotated[str, Field(max_length=40, examples=["fb_5e0c3b9c0d3c4a0f8f0e8f7a1b2c3d4e"])]


class FeedbackNotFound(NotFound):
    """There is no such feedback."""

    code = "FEEDBACK_NOT_FOUND"


class FeedbackLearned(Conflict):
    """This feedback is already a training prompt."""

    code = "FEEDBACK_LEARNED"


class Feedback(Base):
    __tablename__ = "feedback"
    __table_args__ = (
        Index("ix_feedback_target", "target", "target_id"),
        Index("ix_feedback_model_prompt_id", "model", "prompt_id"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True, default=lambda: f"fb_{uuid4().hex}")
    target: Mapped[str] = mapped_column(String(20))
    target_id: Mapped[str] = mapped_column(String(200))
    rating: Mapped[str] = mapped_column(String(4))
    model: Mapped[str | None] = mapped_column(String(300))  # without its version
    messages: Mapped[Any | None] = mapped_column(OrderedJson)  # the conversation before the answer
    tools: Mapped[Any | None] = mapped_column(OrderedJson)
    answer: Mapped[Any | None] = mapped_column(OrderedJson)  # the assistant's message
    correction: Mapped[Any | None] = mapped_column(OrderedJson)  # the message that it should have been
    comment: Mapped[str | None] = mapped_column(Text)
    prompt_id: Mapped[int | None] = mapped_column(Counter)  # the prompt made from it, which may have been deleted since
    owner_id: Mapped[str | None] = mapped_column(String(36), index=True)  # None: the local owner
    created_by: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=now)
    updated_at: Mapped[datetime] = mapped_column(default=now, onupdate=now)


class FeedbackRequest(BaseModel):
    """A rating of an answer, with the conversation and a correction if given."""

    model_config = ConfigDict(extra="forbid", strict=True)

    target: Target
    target_id: str = Field(min_length=1, max_length=200, examples=["chatcmpl-1"], description="The id of the answer.")
    rating: Rating
    model: str | None = Field(default=None, min_length=1, max_length=300, examples=["homelab:latest"])
    messages: list[Message] | None = Field(
        default=None,
        min_length=1,
        max_length=1000,
        description="The conversation before the answer. The server has it only for stored responses.",
    )
    tools: list[Tool] | None = Field(default=None, max_length=1000)
    answer: str | Message | None = Field(default=None, description="The answer: a text, or a message.")
    correction: str | Message | None = Field(default=None, description="The answer that would have been right.")
    comment: str | None = Field(default=None, max_length=10_000)

    @model_validator(mode="after")
    def validate_combination(self) -> Self:
        for name in ("answer", "correction"):
            value = getattr(self, name)
            if isinstance(value, Message) and value.role != "assistant":
                raise ValueError(f"{name}: must be the assistant's message, not the {value.role}'s")
            if isinstance(value, str) and not value.strip():
                raise ValueError(f"{name}: must not be empty")
        if self.messages is not None and (target_answer := self.correction or self.answer) is not None:
            _build_prompt(self.messages, self.tools, target_answer, "feedback", None, [])
        return self

    @property
    def missing_field(self) -> str | None:
        """A missing field without which the feedback cannot become a prompt."""
        if self.rating == "down" and self.correction is None:
            return None
        if self.messages is None:
            return "messages"
        return "answer" if self.answer is None and self.correction is None else None


class FeedbackFilter(BaseModel):
    """Selects the feedback that meets all of these conditions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ids: list[Id] | None = Field(default=None, min_length=1, max_length=MAX_LEARNED)
    model: str | None = Field(default=None, min_length=1, max_length=300)
    rating: Rating | None = None
    all_owners: bool = Field(
        default=False,
        description="By a model or a rating: also feedback of other users, for administrators. Otherwise only their "
        "own and that of other administrators.",
    )
    category: str | None = Field(default="feedback", min_length=1, max_length=100, description="Of the new prompts.")
    tags: Tags = Field(default=["feedback"], description="Of the new prompts.")

    @model_validator(mode="after")
    def validate_filter(self) -> Self:
        if self.ids is None and self.model is None and self.rating is None:
            raise ValueError("select feedback by ids, a model or a rating")
        return self


@dataclass
class LearnResult:
    prompt_ids: list[int] = field(default_factory=list[int])
    skipped: dict[str, str] = field(default_factory=dict[str, str])
    """The ids of feedback that did not become a prompt, with the reasons."""
    remaining: int = 0
    """The amount of matching feedback beyond MAX_LEARNED."""


async def save(session: AsyncSession, request: FeedbackRequest, principal: Principal) -> tuple[Feedback, bool]:
    """Store feedback. It replaces earlier feedback of its owner on the same answer. Returns whether it is the first."""
    await advisory_lock(session, f"feedback {principal.id} {request.target_id}")
    same = (Feedback.target == request.target, Feedback.target_id == request.target_id)
    existing = await session.scalar(select(Feedback).where(*same, Feedback.owner_id == principal.id))
    if existing is not None and existing.prompt_id is not None:
        raise FeedbackLearned(
            f"{existing.id} is already a training prompt: change prompt {existing.prompt_id} instead."
        )
    columns = _columns(request)
    if existing is None:
        feedback = Feedback(**columns, owner_id=principal.id, created_by=principal.name)
        session.add(feedback)
    else:
        feedback = existing
        for name, value in columns.items():
            setattr(feedback, name, value)
    await session.flush()
    return feedback, existing is None


async def find(session: AsyncSession, feedback_id: str, principal: Principal, *, lock: bool = False) -> Feedback:
    feedback = await session.get(Feedback, feedback_id, with_for_update=lock)
    return require(feedback, principal, FeedbackNotFound(f"There is no feedback '{feedback_id}'."))


async def learn(session: AsyncSession, filters: FeedbackFilter, principal: Principal) -> LearnResult:
    """Turn feedback into training prompts, each once: from the correction, or else from an approved answer.

    Feedback of other users is learned only if its ids are named, or if the filter says so.
    """
    query = visible(select(Feedback), Feedback, principal)
    if filters.model is not None:
        query = query.where(Feedback.model == base_name(filters.model))
    if filters.rating is not None:
        query = query.where(Feedback.rating == filters.rating)
    if filters.ids is None:
        query = query.where(Feedback.prompt_id.is_(None), _is_learnable())
        if not filters.all_owners:
            query = identity.trusted(query, Feedback, principal)
    else:
        query = query.where(Feedback.id.in_(filters.ids))
    total = await session.scalar(select(func.count()).select_from(query.subquery())) or 0
    oldest_first = query.order_by(Feedback.created_at, Feedback.id).limit(MAX_LEARNED)
    chosen = list(await session.scalars(oldest_first.with_for_update()))
    missing = sorted(set(filters.ids or ()) - {feedback.id for feedback in chosen})
    if missing and filters.model is None and filters.rating is None:
        raise FeedbackNotFound(f"There is no feedback '{missing[0]}'.")
    learned = LearnResult(remaining=total - len(chosen))
    for feedback in chosen:
        if reason := _skip_reason(feedback):
            learned.skipped[feedback.id] = reason
            continue
        prompt = await prompts.create(session, to_prompt(feedback, filters.category, filters.tags), principal)
        feedback.prompt_id = prompt.id
        learned.prompt_ids.append(prompt.id)
    await session.flush()
    return learned


async def count_new(session: AsyncSession, model: str) -> int:
    """The amount of feedback on a model that can become prompts and has not yet."""
    new = (Feedback.model == base_name(model), Feedback.prompt_id.is_(None), _is_learnable())
    return await session.scalar(select(func.count()).select_from(Feedback).where(*new)) or 0


def trusts_everybody() -> bool:
    """Whether retrainings learn from everybody's feedback, not only from what administrators have given or chosen."""
    return get_settings().guardian.min_feedback is not None


def learned_prompts(model: str) -> Select[int]:
    """The ids of the prompts from feedback on a model that its retrainings learn from."""
    query = select(Prompt.id).join(Feedback, Feedback.prompt_id == Prompt.id).where(Feedback.model == base_name(model))
    return query if trusts_everybody() else identity.trusted(query, Prompt, LOCAL)


async def has_learned(session: AsyncSession, model: str) -> bool:
    """Whether there are prompts from feedback that the retrainings of this model learn from."""
    return await session.scalar(learned_prompts(model).limit(1)) is not None


def to_prompt(feedback: Feedback, category: str | None, tags: Sequence[str]) -> PromptRequest:
    messages = [Message.model_validate(message) for message in feedback.messages or ()]
    tools = [Tool.model_validate(tool) for tool in feedback.tools or ()] or None
    answer = Message.model_validate(feedback.correction or feedback.answer)
    return _build_prompt(messages, tools, answer, f"Feedback on {feedback.target_id}"[:200], category, tags)


def base_name(model: str) -> str:
    """The name without a version: homelab:latest and homelab:v3 become homelab. Other names stay unchanged."""
    try:
        return models_versions.parse_reference(model)[0]
    except ModelNotFound:
        return model


def _build_prompt(
    messages: Sequence[Message],
    tools: list[Tool] | None,
    answer: str | Message,
    name: str,
    category: str | None,
    tags: Sequence[str],
) -> PromptRequest:
    """Build a prompt from a conversation and its answer. Raises ValueError if it would not be valid."""
    system, rest = (messages[0].content, messages[1:]) if messages[0].role == "system" else (None, messages)
    if not rest or rest[0].role != "user" or rest[-1].role == "assistant":
        raise ValueError("messages: must begin with the user's question, and end before the answer")
    message = answer if isinstance(answer, Message) else Message(role="assistant", content=answer)
    try:
        return PromptRequest(
            name=name,
            category=category,
            system_prompt=system,
            user_input=cast(str, rest[0].content),
            messages=list(rest[1:]) or None,
            expected_output=message.content,
            tool_calls=message.tool_calls,
            tools=tools,
            tags=list(tags),
        )
    except ValidationError as error:
        raise ValueError(first_error_message(error)) from None


def _columns(request: FeedbackRequest) -> dict[str, Any]:
    fields = request.model_dump(exclude_none=True)
    columns = {name: fields.get(name) for name in FeedbackRequest.model_fields}
    for name in ("answer", "correction"):
        if isinstance(value := columns[name], str):
            columns[name] = {"role": "assistant", "content": value}
    columns["model"] = base_name(request.model) if request.model else None
    return columns


def _is_learnable() -> ColumnElement[bool]:
    approved = and_(Feedback.rating == "up", Feedback.answer.is_not(None))
    return and_(Feedback.messages.is_not(None), or_(Feedback.correction.is_not(None), approved))


def _skip_reason(feedback: Feedback) -> str | None:
    """The reason why feedback cannot become a prompt, if there is one."""
    if feedback.prompt_id is not None:
        return f"it is already prompt {feedback.prompt_id}"
    if feedback.correction is None and feedback.rating == "down":
        return "the answer was rated down, and there is no correction"
    if feedback.messages is None or (feedback.correction or feedback.answer) is None:
        return "the question or the answer is missing"
    return None
