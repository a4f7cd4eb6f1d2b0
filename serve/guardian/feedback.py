"""The routes of people's feedback on answers, and of the training prompts that are created from it."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field, ValidationError
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import get_database
from cluster.errors import UnprocessableRequest
from cluster.ownership import Principal, visible
from cluster.times import UtcTime
from pipelines.guardian.feedback import store as feedback_store
from pipelines.guardian.feedback.store import Feedback, FeedbackFilter, FeedbackRequest, Id, Rating, Target, base_name
from pipelines.guardian.retrain import job as retrain_job
from pipelines.training.data.messages import Message, Tool
from pipelines.training.data.parsing import first_error_message
from serve.http.pagination import Page, PaginationParams
from serve.openai.responses import store as response_store
from serve.openai.responses.conversation import to_messages
from serve.security.callers import CurrentCaller

router = APIRouter()

ModelFilter = Annotated[str, Query(max_length=300, description="NAME: feedback on any of its versions.")]


class FeedbackIncomplete(UnprocessableRequest):
    """This feedback cannot become a training prompt: send the messages and the answer with it."""

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
    prompt_id: int | None = Field(description="The training prompt that was created from it. Null: none yet.")
    created_by: str
    created_at: UtcTime
    updated_at: UtcTime


class FeedbackAccepted(FeedbackView):
    retrain_job_id: str | None = Field(description="The retraining plan that this feedback started. Null: none.")


class SkippedView(BaseModel):
    id: str
    reason: str


class LearnedView(BaseModel):
    created: int
    prompt_ids: list[int]
    skipped: list[SkippedView] = Field(description="Feedback without a training prompt, and why.")
    left: int = Field(description="Remaining feedback: repeat the request for it.")


@router.post(
    "/api/v1/feedback",
    status_code=201,
    responses={200: {"model": FeedbackAccepted, "description": "Replaced earlier feedback"}},
)
async def give_feedback(body: FeedbackRequest, caller: CurrentCaller, response: Response) -> FeedbackAccepted:
    """Rate an answer, or correct it. New feedback on the same answer replaces the old one."""
    async with get_database().transaction() as session:
        completed = await _with_stored_conversation(session, body, caller)
        if completed.missing_field:
            raise FeedbackIncomplete(
                f"{completed.missing_field} is missing. A {completed.target} is not stored, so send what was asked "
                "(messages), and what was answered (answer) or the right answer (correction)."
            )
        saved, is_first = await feedback_store.save(session, completed, caller)
        plan = await retrain_job.enqueue_after_feedback(session, saved.model) if saved.model else None
        response.status_code = 201 if is_first else 200
        return FeedbackAccepted(**dict(_view(saved)), retrain_job_id=plan.id if plan else None)


@router.get("/api/v1/feedback")
async def list_feedback(
    caller: CurrentCaller,
    paging: PaginationParams,
    target: Target | SkipJsonSchema[None] = None,
    rating: Rating | SkipJsonSchema[None] = None,
    model: ModelFilter | SkipJsonSchema[None] = None,
    learned: bool | SkipJsonSchema[None] = None,
) -> Page[FeedbackView]:
    """List feedback, the newest first. Administrators see all feedback, others their own."""
    query = visible(select(Feedback), Feedback, caller)
    for column, value in (
        (Feedback.target, target),
        (Feedback.rating, rating),
        (Feedback.model, None if model is None else base_name(model)),
    ):
        if value is not None:
            query = query.where(column == value)
    if learned is not None:
        query = query.where(Feedback.prompt_id.is_not(None) if learned else Feedback.prompt_id.is_(None))
    newest_first = query.order_by(Feedback.created_at.desc(), Feedback.id)
    async with get_database().read_transaction() as session:
        rows = await paging.read(session, newest_first)
        return paging.page([_view(row) for row in rows.items], rows.total)


@router.get("/api/v1/feedback/{feedback_id}")
async def show_feedback(feedback_id: Id, caller: CurrentCaller) -> FeedbackView:
    async with get_database().read_transaction() as session:
        return _view(await feedback_store.find(session, feedback_id, caller))


@router.delete("/api/v1/feedback/{feedback_id}", status_code=204)
async def delete_feedback(feedback_id: Id, caller: CurrentCaller) -> None:
    """Delete feedback. The training prompt that was created from it stays."""
    async with get_database().transaction() as session:
        await session.delete(await feedback_store.find(session, feedback_id, caller, lock=True))


@router.post("/api/training/prompts/from-feedback", status_code=201)
async def learn_from_feedback(body: FeedbackFilter, caller: CurrentCaller) -> LearnedView:
    """Create training prompts from feedback: from its correction, or from an answer that was rated good.

    Each feedback becomes one prompt at most.
    """
    async with get_database().transaction() as session:
        result = await feedback_store.learn(session, body, caller)
    skipped = [SkippedView(id=feedback_id, reason=reason) for feedback_id, reason in result.skipped.items()]
    return LearnedView(
        created=len(result.prompt_ids), prompt_ids=result.prompt_ids, skipped=skipped, left=result.remaining
    )


async def _with_stored_conversation(
    session: AsyncSession, body: FeedbackRequest, principal: Principal
) -> FeedbackRequest:
    """Add the messages and the answer of a stored response, if the request does not have them."""
    if body.target != "response" or body.messages is not None:
        return body
    stored = await response_store.find(session, body.target_id, principal)
    input_items = await response_store.input_items_of(session, body.target_id, principal)
    answers = [message for message in to_messages(stored.body["output"]) if message["role"] == "assistant"]
    system = (
        [{"role": "system", "content": instructions}]
        if isinstance(instructions := stored.body.get("instructions"), str)
        else []
    )
    stored_fields: dict[str, Any] = {
        "messages": [*system, *map(_without_reasoning, to_messages(input_items))],
        "model": stored.body["model"],
    }
    stored_fields["tools"] = [_to_chat_tool(tool) for tool in stored.body.get("tools") or ()] or None
    if body.answer is None and answers:
        stored_fields["answer"] = _without_reasoning(answers[-1])
    request_fields = body.model_dump(exclude_none=True)
    try:
        return FeedbackRequest.model_validate({**stored_fields, **request_fields})
    except ValidationError as error:
        raise FeedbackIncomplete(
            f"{body.target_id} cannot become a training prompt: {first_error_message(error)}."
        ) from None


def _without_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "reasoning_content"}


def _to_chat_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Convert from the format of the Responses API."""
    fields = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in fields if tool.get(name) is not None}}


def _view(row: Feedback) -> FeedbackView:
    values: dict[str, Any] = {name: getattr(row, name) for name in FeedbackView.model_fields}
    return FeedbackView.model_validate(values)
