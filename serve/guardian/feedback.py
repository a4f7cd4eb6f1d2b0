"""/api/v1/feedback: what people say of answers; and what is learned from it."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field, ValidationError
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import get_database
from cluster.errors import UnprocessableRequest
from cluster.ownership import Owner
from cluster.times import UtcTime
from pipelines.guardian.feedback import store as feedback_store
from pipelines.guardian.feedback.store import Feedback, FeedbackFilter, FeedbackRequest, Id, Rating, Target, name_of
from pipelines.guardian.retrain import job as retrain_job
from pipelines.training.data.messages import Message, Tool
from pipelines.training.data.parsing import sentence
from serve.http.errors import ERROR_RESPONSES
from serve.http.pagination import Page, WantedPage
from serve.openai.responses import store as response_store
from serve.openai.responses.conversation import messages_of
from serve.security.callers import CurrentCaller, owner_of

router = APIRouter(tags=["Feedback"], responses=ERROR_RESPONSES)

MODEL = Annotated[str, Query(max_length=300, description="NAME, whatever version of it.")]


class FeedbackIncomplete(UnprocessableRequest):
    """Nothing could be learned from this feedback: say what was asked and answered."""

    code = "FEEDBACK_INCOMPLETE"


class FeedbackView(BaseModel):
    id: str
    target: Target
    target_id: str
    rating: Rating
    model: str | None
    messages: list[Message] | None
    tools: list[Tool] | None
    answer: Message | None
    correction: Message | None
    comment: str | None
    prompt_id: int | None = Field(description="The training prompt that was made of it. Null: none yet.")
    created_by: str
    created_at: UtcTime
    updated_at: UtcTime


class Given(FeedbackView):
    retrain_job_id: str | None = Field(description="The plan that this feedback, with others, has started.")


class SkippedView(BaseModel):
    id: str
    reason: str


class LearnedView(BaseModel):
    created: int
    prompt_ids: list[int]
    skipped: list[SkippedView] = Field(description="What nothing was learned from, and why.")
    left: int = Field(description="How much more there is: ask again.")


@router.post("/api/v1/feedback", status_code=201, responses={200: {"model": Given, "description": "Said anew"}})
async def give_feedback(wanted: FeedbackRequest, caller: CurrentCaller, response: Response) -> Given:
    """Say whether an answer was good, or what would have been. Said again of the same answer, it is the newer word."""
    owner = owner_of(caller)
    async with get_database().transaction() as session:
        request = await _completed(session, wanted, owner)
        if request.lacks:
            raise FeedbackIncomplete(
                f"{request.lacks} is missing: nothing is kept here of a {request.target}, so say what was asked "
                "(messages) and answered (answer), or what should have been (correction)."
            )
        given, is_first = await feedback_store.give(session, request, owner)
        plan = await retrain_job.ask_after_feedback(session, given.model) if given.model else None
        response.status_code = 201 if is_first else 200
        return Given(**dict(_view(given)), retrain_job_id=plan.id if plan else None)


@router.get("/api/v1/feedback")
async def list_feedback(
    caller: CurrentCaller,
    paging: WantedPage,
    target: Target | SkipJsonSchema[None] = None,
    rating: Rating | SkipJsonSchema[None] = None,
    model: MODEL | SkipJsonSchema[None] = None,
    learned: bool | SkipJsonSchema[None] = None,
) -> Page[FeedbackView]:
    """Feedback, the newest first: your own, or everybody's when you are an administrator."""
    wanted = feedback_store.visible_to(owner_of(caller))
    for column, value in (
        (Feedback.target, target),
        (Feedback.rating, rating),
        (Feedback.model, None if model is None else name_of(model)),
    ):
        if value is not None:
            wanted = wanted.where(column == value)
    if learned is not None:
        wanted = wanted.where(Feedback.prompt_id.is_not(None) if learned else Feedback.prompt_id.is_(None))
    newest_first = wanted.order_by(Feedback.created_at.desc(), Feedback.id)
    async with get_database().reading() as session:
        total = await session.scalar(select(func.count()).select_from(wanted.subquery())) or 0
        rows = await session.scalars(newest_first.offset(paging.skip).limit(paging.limit))
        return paging.page([_view(one) for one in rows], total)


@router.get("/api/v1/feedback/{feedback_id}")
async def show_feedback(feedback_id: Id, caller: CurrentCaller) -> FeedbackView:
    async with get_database().reading() as session:
        return _view(await feedback_store.find(session, feedback_id, owner_of(caller)))


@router.delete("/api/v1/feedback/{feedback_id}", status_code=204)
async def delete_feedback(feedback_id: Id, caller: CurrentCaller) -> None:
    """Delete feedback. A prompt that was made of it stays."""
    async with get_database().transaction() as session:
        await session.delete(await feedback_store.find(session, feedback_id, owner_of(caller), lock=True))


@router.post("/api/training/prompts/from-feedback", status_code=201)
async def learn_from_feedback(wanted: FeedbackFilter, caller: CurrentCaller) -> LearnedView:
    """Make training prompts of feedback, each once: of the correction, or of an answer that was found good."""
    async with get_database().transaction() as session:
        learned = await feedback_store.learn(session, wanted, owner_of(caller))
    skipped = [SkippedView(id=one, reason=reason) for one, reason in learned.skipped.items()]
    return LearnedView(
        created=len(learned.prompt_ids), prompt_ids=learned.prompt_ids, skipped=skipped, left=learned.left
    )


async def _completed(session: AsyncSession, wanted: FeedbackRequest, owner: Owner) -> FeedbackRequest:
    """With what was asked and answered, where that is kept here."""
    if wanted.target != "response" or wanted.messages is not None:
        return wanted
    stored = await response_store.find(session, wanted.target_id, owner)
    asked = await response_store.given_to(session, wanted.target_id, owner)
    answered = [message for message in messages_of(stored.body["output"]) if message["role"] == "assistant"]
    system = [{"role": "system", "content": said}] if isinstance(said := stored.body.get("instructions"), str) else []
    found: dict[str, Any] = {"messages": [*system, *map(_plain, messages_of(asked))], "model": stored.body["model"]}
    found["tools"] = [_tool(tool) for tool in stored.body.get("tools") or ()] or None
    if wanted.answer is None and answered:
        found["answer"] = _plain(answered[-1])
    told = wanted.model_dump(exclude_none=True)
    try:
        return FeedbackRequest.model_validate({**found, **told})
    except ValidationError as error:
        raise FeedbackIncomplete(f"Nothing can be learned from {wanted.target_id}: {sentence(error)}.") from None


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """Without what the model thought: that is not learned."""
    return {name: value for name, value in message.items() if name != "reasoning_content"}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """As the tools of conversations are told."""
    fields = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in fields if tool.get(name) is not None}}


def _view(one: Feedback) -> FeedbackView:
    told: dict[str, Any] = {name: getattr(one, name) for name in FeedbackView.model_fields}
    return FeedbackView.model_validate(told)
