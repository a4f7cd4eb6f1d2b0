"""Training prompts: exchanges that people write by hand, stored as rows, and their conversion into samples."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from sqlalchemy import JSON, Select, String, Text, func, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster import identity
from cluster.db import Base, now
from cluster.db import Sequence as Counter
from cluster.errors import InvalidRequest, NotFound, UnprocessableRequest
from cluster.ownership import Principal, require, visible
from pipelines.training.data.messages import Message, Tool, ToolCall
from pipelines.training.data.parsing import InvalidSample, first_error_message, parse_json_line
from pipelines.training.data.samples import Sample
from pipelines.training.spec import PromptFilter

MAX_ID = 2**63 - 1
PAGE_SIZE = 1000
"""Rows read or written in one statement. Databases limit the parameters of a statement."""

# Not JSONB, which loses the order of fields: a model reads the fields of a tool in their order.
OrderedJson = JSON(none_as_null=True)

Name = Annotated[str, Field(min_length=1, max_length=200, examples=["Movie request"])]
Input = Annotated[str, Field(min_length=1, max_length=1_000_000, examples=["I want to watch Inception"])]
Tags = Annotated[list[Annotated[str, Field(min_length=1, max_length=100)]], Field(max_length=100)]
Row = TypeVar("Row")


class PromptNotFound(NotFound):
    """There is no such prompt."""

    code = "PROMPT_NOT_FOUND"


class NoMatchingPrompt(InvalidRequest):
    """No training prompt matches."""

    code = "NO_MATCHING_PROMPT"


class Prompt(Base):
    __tablename__ = "training_prompts"
    # Ids are never reused: a training session refers to its prompts by id.
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012

    id: Mapped[int] = mapped_column(Counter, primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    category: Mapped[str | None] = mapped_column(String(100), index=True)
    system_prompt: Mapped[str | None] = mapped_column(Text)
    user_input: Mapped[str] = mapped_column(Text)
    expected_output: Mapped[str | None] = mapped_column(Text)
    tags: Mapped[list[str]]
    tools: Mapped[Any | None] = mapped_column(OrderedJson)
    messages: Mapped[Any | None] = mapped_column(OrderedJson)
    tool_calls: Mapped[Any | None] = mapped_column(OrderedJson)
    owner_id: Mapped[str | None] = mapped_column(String(36), index=True)  # None: the local owner
    created_by: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=now)
    updated_at: Mapped[datetime] = mapped_column(default=now, onupdate=now)


class PromptRequest(BaseModel):
    """A question, and the answer or the tool calls that the assistant should give."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Name
    category: str | None = Field(default=None, min_length=1, max_length=100, examples=["media"])
    system_prompt: str | None = Field(default=None, max_length=1_000_000)
    user_input: Input
    expected_output: str | None = Field(
        default=None, max_length=1_000_000, examples=["I'll request Inception for you via Overseerr."]
    )
    tags: Tags = []
    tools: list[Tool] | None = Field(
        default=None, max_length=1000, description="Functions that the assistant may call."
    )
    messages: list[Message] | None = Field(
        default=None,
        max_length=1000,
        description="Messages between user_input and expected_output, such as a call and its result.",
    )
    tool_calls: list[ToolCall] | None = Field(
        default=None, max_length=100, description="What the assistant should call, beside expected_output or instead."
    )

    @model_validator(mode="after")
    def validate_conversation(self) -> Self:
        _to_sample(self)
        return self


def to_columns(request: PromptRequest) -> dict[str, Any]:
    """The columns of a request, in plain JSON."""
    fields = request.model_dump(exclude_none=True)
    return {name: fields.get(name) for name in PromptRequest.model_fields}


async def create(session: AsyncSession, request: PromptRequest, principal: Principal) -> Prompt:
    prompt = Prompt(**to_columns(request), owner_id=principal.id, created_by=principal.name)
    session.add(prompt)
    await session.flush()
    return prompt


async def create_many(session: AsyncSession, columns: Iterable[dict[str, Any]], principal: Principal) -> None:
    """Create prompts from results of `to_columns`. The iterable is read in another thread."""
    rows = ({**values, "owner_id": principal.id, "created_by": principal.name} for values in columns)
    while page := await asyncio.to_thread(lambda: list(islice(rows, PAGE_SIZE))):
        await session.execute(insert(Prompt), page)


async def update_prompt(session: AsyncSession, prompt: Prompt, changes: Mapping[str, Any]) -> None:
    """Set these fields. Raises UnprocessableRequest if the prompt would not be valid."""
    current = {name: getattr(prompt, name) for name in PromptRequest.model_fields}
    try:
        request = PromptRequest.model_validate({**current, **changes})
    except ValidationError as error:
        raise UnprocessableRequest(f"The prompt would not be valid: {first_error_message(error)}.") from None
    for name, value in to_columns(request).items():
        setattr(prompt, name, value)
    await session.flush()


async def get(session: AsyncSession, prompt_id: int, principal: Principal, *, lock: bool = False) -> Prompt:
    prompt = await session.get(Prompt, prompt_id, with_for_update=lock)
    return require(prompt, principal, PromptNotFound(f"There is no prompt {prompt_id}."))


def filter_prompts(
    session: AsyncSession,
    query: Select[Row],
    *,
    category: str | None = None,
    tags: Sequence[str] | None = None,
    search: str | None = None,
) -> Select[Row]:
    if category is not None:
        query = query.where(Prompt.category == category)
    if tags is not None:
        expand = func.jsonb_array_elements_text if session.get_bind().dialect.name == "postgresql" else func.json_each
        tag = expand(Prompt.tags).table_valued("value").c.value
        query = query.where(select(1).where(tag.in_(tags)).exists())
    if search is not None:
        texts = (Prompt.name, Prompt.user_input, Prompt.expected_output)
        query = query.where(or_(*(text.icontains(search, autoescape=True) for text in texts)))
    return query


async def find_matching_ids(session: AsyncSession, prompt_filter: PromptFilter, principal: Principal) -> list[int]:
    """The ids of the prompts that match, in ascending order. Raises NoMatchingPrompt if there are none.

    What other users have written is learned only if its ids are named, or if the filter says so.
    """
    query = visible(select(Prompt.id), Prompt, principal).order_by(Prompt.id)
    query = filter_prompts(session, query, category=prompt_filter.category, tags=prompt_filter.tags)
    if prompt_filter.ids is None and not prompt_filter.all_owners:
        query = identity.trusted(query, Prompt, principal)
    if prompt_filter.ids is None:
        found = list(await session.scalars(query))
    else:
        ids = sorted({number for number in prompt_filter.ids if 0 < number <= MAX_ID})
        pages = [ids[start : start + PAGE_SIZE] for start in range(0, len(ids), PAGE_SIZE)]
        found = [number for page in pages for number in await session.scalars(query.where(Prompt.id.in_(page)))]
        missing = set(prompt_filter.ids) - set(found)
        if missing and prompt_filter.tags is None and prompt_filter.category is None:
            raise PromptNotFound(f"There {_missing_text(sorted(missing))}.")
    if not found:
        remedy = " With all_owners, those of other users count too." if principal.is_admin else ""
        raise NoMatchingPrompt(f"No training prompt of yours has {_describe_filter(prompt_filter)}.{remedy}")
    return found


async def load_samples(session: AsyncSession, prompt_filter: PromptFilter, principal: Principal) -> list[Sample]:
    """The prompts that match, as samples."""
    ids = await find_matching_ids(session, prompt_filter, principal)
    conversations: list[Sample] = []
    for start in range(0, len(ids), PAGE_SIZE):
        page = select(Prompt).where(Prompt.id.in_(ids[start : start + PAGE_SIZE])).order_by(Prompt.id)
        conversations += [_to_sample(prompt) for prompt in await session.scalars(page)]
    return conversations


def read_line(line: str | bytes, location: str) -> PromptRequest:
    """Parse a prompt from a line of JSONL."""
    document = parse_json_line(line, location)
    try:
        return PromptRequest.model_validate(document)
    except ValidationError as error:
        raise InvalidSample(
            f"The {location} is not a valid prompt: {first_error_message(error)}.", details={"place": location}
        ) from None


def to_request(prompt: Prompt) -> dict[str, Any]:
    """The fields of a prompt that can be imported again: a line of an export."""
    fields = {name: getattr(prompt, name) for name in PromptRequest.model_fields}
    return {name: value for name, value in fields.items() if value is not None}


def _to_sample(prompt: Prompt | PromptRequest) -> Sample:
    """Raises ValueError if the prompt is not a valid conversation."""
    middle = [_dump(message) for message in prompt.messages or ()]
    answer = {"role": "assistant", "content": prompt.expected_output, "tool_calls": _dump(prompt.tool_calls or None)}
    system = [{"role": "system", "content": prompt.system_prompt}] if prompt.system_prompt else []
    question = {"role": "user", "content": prompt.user_input}
    try:
        return Sample.model_validate({"messages": [*system, question, *middle, answer], "tools": _dump(prompt.tools)})
    except ValidationError as error:
        raise ValueError(first_error_message(error)) from None


def _dump(value: Any) -> Any:
    if isinstance(value, list):
        return [_dump(item) for item in value]
    return value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value


def _missing_text(missing: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in missing[:10]) + (", …" if len(missing) > 10 else "")
    return f"is no prompt {shown}" if len(missing) == 1 else f"are no prompts {shown}"


def _describe_filter(prompt_filter: PromptFilter) -> str:
    parts = [f"the category '{prompt_filter.category}'"] if prompt_filter.category is not None else []
    parts += [f"any of the tags {', '.join(prompt_filter.tags[:10])}"] if prompt_filter.tags else []
    parts += ["one of these ids"] if prompt_filter.ids else []
    return " and ".join(parts)
