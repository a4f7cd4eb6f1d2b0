"""Training prompts: single exchanges that people write and keep by hand, for models to learn from."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from sqlalchemy import JSON, Select, String, Text, func, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster.db import Base, now
from cluster.db import Sequence as Counter
from cluster.errors import InvalidRequest, NotFound, UnprocessableRequest
from cluster.ownership import LOCAL, Owner
from pipelines.training.data.messages import Message, Tool, ToolCall
from pipelines.training.data.parsing import InvalidSample, read_json, sentence
from pipelines.training.data.samples import Sample
from pipelines.training.spec import PromptFilter

ID_MAX = 2**63 - 1
PAGE = 1000
"""How many rows are read, or written, in one statement: databases bound the parameters of one."""

# Not JSONB: that forgets in what order the fields of a tool were told, and a model reads them in their order.
Told = JSON(none_as_null=True)

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
    # Ids are never given out again: a training session remembers its prompts by them.
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012

    id: Mapped[int] = mapped_column(Counter, primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    category: Mapped[str | None] = mapped_column(String(100), index=True)
    system_prompt: Mapped[str | None] = mapped_column(Text)
    user_input: Mapped[str] = mapped_column(Text)
    expected_output: Mapped[str | None] = mapped_column(Text)
    tags: Mapped[list[str]]
    tools: Mapped[Any | None] = mapped_column(Told)
    messages: Mapped[Any | None] = mapped_column(Told)
    tool_calls: Mapped[Any | None] = mapped_column(Told)
    owner_id: Mapped[str | None] = mapped_column(String(36), index=True)  # None: this machine's own
    created_by: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=now)
    updated_at: Mapped[datetime] = mapped_column(default=now, onupdate=now)


class PromptRequest(BaseModel):
    """What somebody asks, and what the assistant should say or call."""

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
        description="What is said between user_input and expected_output, such as a call and its result.",
    )
    tool_calls: list[ToolCall] | None = Field(
        default=None, max_length=100, description="What the assistant should call, beside expected_output or instead."
    )

    @model_validator(mode="after")
    def be_conversation(self) -> Self:
        _conversation(self)
        return self


def columns(request: PromptRequest) -> dict[str, Any]:
    """A request as the table takes it, in plain JSON."""
    told = request.model_dump(exclude_none=True)
    return {name: told.get(name) for name in PromptRequest.model_fields}


async def create(session: AsyncSession, request: PromptRequest, owner: Owner = LOCAL) -> Prompt:
    prompt = Prompt(**columns(request), owner_id=owner.id, created_by=owner.name)
    session.add(prompt)
    await session.flush()
    return prompt


async def create_many(session: AsyncSession, checked: Iterable[dict[str, Any]], owner: Owner = LOCAL) -> None:
    """Create prompts from the `columns` of requests, which are read in another thread."""
    rows = ({**row, "owner_id": owner.id, "created_by": owner.name} for row in checked)
    while page := await asyncio.to_thread(lambda: list(islice(rows, PAGE))):
        await session.execute(insert(Prompt), page)


async def change(session: AsyncSession, prompt: Prompt, changes: Mapping[str, Any]) -> None:
    """Set these fields, if the prompt makes sense with them."""
    before = {name: getattr(prompt, name) for name in PromptRequest.model_fields}
    try:
        request = PromptRequest.model_validate({**before, **changes})
    except ValidationError as error:
        raise UnprocessableRequest(f"The prompt would not be valid: {sentence(error)}.") from None
    for name, value in columns(request).items():
        setattr(prompt, name, value)
    await session.flush()


async def get(session: AsyncSession, prompt_id: int, owner: Owner = LOCAL, *, lock: bool = False) -> Prompt:
    prompt = await session.get(Prompt, prompt_id, with_for_update=lock)
    if prompt is None or not (owner.is_admin or prompt.owner_id == owner.id):
        raise PromptNotFound(f"There is no prompt {prompt_id}.")
    return prompt


def visible_to(owner: Owner, query: Select[Row]) -> Select[Row]:
    """Of these prompts those that the owner may see: the own ones, or everybody's when it is an administrator."""
    return query if owner.is_admin else query.where(Prompt.owner_id == owner.id)


def narrowed(
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
        listed = func.jsonb_array_elements_text if session.get_bind().dialect.name == "postgresql" else func.json_each
        tag = listed(Prompt.tags).table_valued("value").c.value
        query = query.where(select(1).where(tag.in_(tags)).exists())
    if search is not None:
        texts = (Prompt.name, Prompt.user_input, Prompt.expected_output)
        query = query.where(or_(*(text.icontains(search, autoescape=True) for text in texts)))
    return query


async def matching(session: AsyncSession, wanted: PromptFilter, owner: Owner = LOCAL) -> list[int]:
    """The ids of the prompts that are wanted, in their order; there is at least one."""
    query = visible_to(owner, select(Prompt.id)).order_by(Prompt.id)
    query = narrowed(session, query, category=wanted.category, tags=wanted.tags)
    if wanted.ids is None:
        found = list(await session.scalars(query))
    else:
        asked = sorted({number for number in wanted.ids if 0 < number <= ID_MAX})
        pages = [asked[start : start + PAGE] for start in range(0, len(asked), PAGE)]
        found = [number for page in pages for number in await session.scalars(query.where(Prompt.id.in_(page)))]
        missing = set(wanted.ids) - set(found)
        if missing and wanted.tags is None and wanted.category is None:
            raise PromptNotFound(f"There {_are(sorted(missing))}.")
    if not found:
        raise NoMatchingPrompt(f"No training prompt of yours has {_said(wanted)}.")
    return found


async def samples(session: AsyncSession, wanted: PromptFilter, owner: Owner = LOCAL) -> list[Sample]:
    """The prompts that are wanted, as conversations to learn."""
    found = await matching(session, wanted, owner)
    learned: list[Sample] = []
    for start in range(0, len(found), PAGE):
        page = select(Prompt).where(Prompt.id.in_(found[start : start + PAGE])).order_by(Prompt.id)
        learned += [_conversation(prompt) for prompt in await session.scalars(page)]
    return learned


def read_line(line: str | bytes, place: str) -> PromptRequest:
    """A prompt from a line of JSONL."""
    document = read_json(line, place)
    try:
        return PromptRequest.model_validate(document)
    except ValidationError as error:
        raise InvalidSample(f"The {place} is no prompt: {sentence(error)}.", details={"place": place}) from None


def as_request(prompt: Prompt) -> dict[str, Any]:
    """What of a prompt can be given to another one: a line of an export."""
    told = {name: getattr(prompt, name) for name in PromptRequest.model_fields}
    return {name: value for name, value in told.items() if value is not None}


def _conversation(prompt: Prompt | PromptRequest) -> Sample:
    """Raises ValidationError, which is a ValueError too, if it makes no sense."""
    between = [_plain(message) for message in prompt.messages or ()]
    answer = {"role": "assistant", "content": prompt.expected_output, "tool_calls": _plain(prompt.tool_calls or None)}
    first = [{"role": "system", "content": prompt.system_prompt}] if prompt.system_prompt else []
    asked = {"role": "user", "content": prompt.user_input}
    try:
        return Sample.model_validate({"messages": [*first, asked, *between, answer], "tools": _plain(prompt.tools)})
    except ValidationError as error:
        raise ValueError(sentence(error)) from None


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value


def _are(missing: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in missing[:10]) + (", …" if len(missing) > 10 else "")
    return f"is no prompt {shown}" if len(missing) == 1 else f"are no prompts {shown}"


def _said(wanted: PromptFilter) -> str:
    said = [f"the category '{wanted.category}'"] if wanted.category is not None else []
    said += [f"any of the tags {', '.join(wanted.tags[:10])}"] if wanted.tags else []
    said += ["one of these ids"] if wanted.ids else []
    return " and ".join(said)
