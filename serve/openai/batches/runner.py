"""How a batch is done: its lines are answered several at once, and what is done is committed in parts.

A part is written to storage first; then a checkpoint says that it counts, and which lines are in it. Whoever takes over
goes on from the last checkpoint: a line may be asked again, but has one outcome. Each attempt writes parts under a name
of its own, so that a worker that was given up for dead cannot change those of its successor.
"""

import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from datetime import timedelta
from io import BytesIO
from secrets import token_hex
from typing import Any, BinaryIO

from sqlalchemy.ext.asyncio import AsyncSession

from cluster import storage
from cluster.db import Database, apart, now
from cluster.errors import Forbidden, ForgearrError
from cluster.files import store as file_store
from cluster.files.store import File
from cluster.identity import User
from cluster.ownership import Owner
from cluster.settings import get_settings
from jobs.context import Context
from pipelines.training.data.parsing import lines_of
from serve.engines.factory import installed
from serve.engines.protocol import Engine
from serve.openai.batches.line import Answering, Outcome, expired
from serve.openai.batches.store import Batch, BatchNotFound, find, folder
from serve.openai.files.validation import MOST_REQUESTS, BatchLine, batch_line

COMMIT_LINES = 100
COMMIT_SECONDS = 5.0
LOOK_SECONDS = 1.0
"""How often to look whether the batch is to end."""
MOST_FAULTS = 100
SUCCEEDED, REFUSED = "output", "errors"


async def run(context: Context, batch_id: str, engine: Engine | None = None) -> dict[str, Any]:
    """Do all of it; returns what there is to say of the batch in the end."""
    return await apart(lambda database: _do(context, database, batch_id, engine or installed(apart=True)))


async def _do(context: Context, database: Database, batch_id: str, engine: Engine) -> dict[str, Any]:
    async with database.reading() as session:
        batch, file, owner = await _load(session, context, batch_id)
    run = _Run(context, database, batch, file, owner)
    if context.checkpoint_state is None and (faults := await run.check()):
        return {"status": "failed", "failed_at": _now(), "errors": faults}
    if run.state["ending"] is None:
        await run.answer_all(Answering(database, engine, owner))
    return await run.finish()


async def _load(session: AsyncSession, context: Context, batch_id: str) -> tuple[Batch, File, Owner]:
    batch = await find(session, batch_id, Owner())
    if batch.job_id != context.job_id:
        raise BatchNotFound(f"There is no batch '{batch_id}' for this job.")
    owner = Owner(name=batch.created_by)
    if batch.owner_id is not None:
        user = await session.get(User, batch.owner_id)
        if user is None or not user.is_active:
            raise Forbidden("The account that this batch belongs to is closed.")
        owner = Owner(id=user.id, name=user.username, is_admin=user.role == "admin")
    return batch, await file_store.find(session, batch.input_file_id, owner), owner


class _Run:
    """One attempt at a batch. `state` is what its checkpoints save."""

    def __init__(self, context: Context, database: Database, batch: Batch, file: File, owner: Owner) -> None:
        self.state: dict[str, Any] = context.checkpoint_state
        self._context = context
        self._database = database
        self._batch = batch
        self._file = file
        self._owner = owner
        self._nonce = token_hex(4)
        self._outcomes: list[Outcome] = []
        self._committed_at = time.monotonic()

    async def check(self) -> list[dict[str, Any]]:
        """What is wrong with the file, line by line; if nothing is, the batch begins."""
        self._context.report(phase="validating")
        total, models, faults = await asyncio.to_thread(_check, self._file, self._batch.endpoint)
        if faults:
            return faults
        counts = {"total": total, "completed": 0, "failed": 0}
        told = {"status": "in_progress", "in_progress_at": _now(), "request_counts": counts, "usage": None}
        model = models.pop() if len(models) == 1 else None
        self.state = {"told": {**told, "model": model}, "ending": None, "first": 1, "done": [], "parts": []}
        await self._save()
        return []

    async def answer_all(self, answering: Answering) -> None:
        """Until all lines are answered, or the batch is to end."""
        settings = get_settings().engines
        most = settings.slots * max(settings.replicas, 1)
        lines = self._lines()
        working: set[asyncio.Task[Outcome]] = set()
        ending, looked_at, more = None, 0.0, True
        try:
            while ending is None:
                while more and len(working) < most:
                    if (line := await anext(lines, None)) is None:
                        more = False
                    else:
                        working.add(asyncio.create_task(answering.answer(*line)))
                if not working:
                    break
                done, working = await asyncio.wait(working, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                self._outcomes += [task.result() for task in done]
                if self._is_commit_due():
                    await self._commit()
                if time.monotonic() - looked_at >= LOOK_SECONDS:
                    ending, looked_at = await self._ending(), time.monotonic()
        finally:
            await _stop(working)
            await lines.aclose()
        await self._commit()
        if ending == "expired":
            await self._let_expire()
        self.state["ending"] = ending or "completed"
        self.state["told"] |= {"status": "finalizing", "finalizing_at": _now()}
        await self._save()

    async def finish(self) -> dict[str, Any]:
        """Make files of the parts. An attempt after this one finds those that there are."""
        self._context.report(phase="finalizing")
        counts, ending = self.state["told"]["request_counts"], self.state["ending"]
        output = await self._keep(SUCCEEDED) if counts["completed"] else None
        errors = await self._keep(REFUSED) if counts["failed"] else None
        await asyncio.to_thread(storage.remove, storage.address(folder(self._batch.id)))
        told = {**self.state["told"], "output_file_id": output, "error_file_id": errors}
        return {**told, "status": ending, f"{ending}_at": _now()}

    async def _lines(self) -> AsyncGenerator[tuple[int, BatchLine]]:
        """The lines that have no outcome yet."""
        known = set(self.state["done"])
        with await asyncio.to_thread(file_store.opened, self._file) as content:
            numbered = _numbered(content)
            while (line := await asyncio.to_thread(next, numbered, None)) is not None:
                number, text = line
                if number >= self.state["first"] and number not in known:
                    yield number, batch_line(text, f"line {number}")

    def _is_commit_due(self) -> bool:
        if self._context.should_stop():
            return True
        late = time.monotonic() - self._committed_at >= COMMIT_SECONDS
        return len(self._outcomes) >= COMMIT_LINES or bool(self._outcomes and late)

    async def _ending(self) -> str | None:
        async with self._database.reading() as session:
            batch = await find(session, self._batch.id, Owner())
        if batch.cancelling_at is not None:
            return "cancelled"
        return "expired" if batch.expires_at <= now() else None

    async def _let_expire(self) -> None:
        async for number, line in self._lines():
            self._outcomes.append(expired(number, line))
            if len(self._outcomes) >= COMMIT_LINES:
                await self._commit()
        await self._commit()

    async def _commit(self) -> None:
        """Let what is done count."""
        outcomes, self._outcomes, self._committed_at = self._outcomes, [], time.monotonic()
        if outcomes:
            index = self._begin_part()
            for kind, succeeded in ((SUCCEEDED, True), (REFUSED, False)):
                lines = b"".join(outcome.line for outcome in outcomes if outcome.succeeded == succeeded)
                if lines:
                    name = _part(self._batch.id, self._nonce, index, kind)
                    await asyncio.to_thread(storage.write, BytesIO(lines), name)
            self._count(outcomes)
        await self._save()

    def _begin_part(self) -> int:
        """The number of the next part of this attempt. Parts are remembered as how many each attempt has made."""
        parts = self.state["parts"]
        if not parts or parts[-1][0] != self._nonce:
            parts.append([self._nonce, 0])
        parts[-1][1] += 1
        return parts[-1][1] - 1

    def _count(self, outcomes: list[Outcome]) -> None:
        told, done = self.state["told"], {*self.state["done"], *(outcome.number for outcome in outcomes)}
        counts = told["request_counts"]
        for outcome in outcomes:
            counts["completed" if outcome.succeeded else "failed"] += 1
            if outcome.usage is not None:
                told["usage"] = _added(told["usage"], outcome.usage)
        while self.state["first"] in done:
            done.remove(self.state["first"])
            self.state["first"] += 1
        self.state["done"] = sorted(done)
        answered = counts["completed"] + counts["failed"]
        self._context.report(progress=100 * answered / counts["total"], phase=f"{answered} of {counts['total']}")

    async def _save(self) -> None:
        await asyncio.to_thread(self._context.checkpoint, self.state)

    async def _keep(self, kind: str) -> str:
        file_id = f"file-{self._batch.id.removeprefix('batch_')}-{kind}"
        seconds = self._batch.output_seconds
        with tempfile.TemporaryFile() as whole:
            await asyncio.to_thread(self._join, kind, whole)
            file = await file_store.keep(
                self._database,
                whole,
                filename=f"{self._batch.id}_{kind}.jsonl",
                purpose="batch_output",
                owner=self._owner,
                lifetime=None if seconds is None else timedelta(seconds=seconds),
                file_id=file_id,
            )
        return file.id

    def _join(self, kind: str, whole: BinaryIO) -> None:
        for nonce, count in self.state["parts"]:
            for index in range(count):
                address = storage.address(_part(self._batch.id, nonce, index, kind))
                if storage.exists(address):
                    with storage.opened(address) as part:
                        shutil.copyfileobj(part, whole)
        whole.seek(0)


def _check(file: File, endpoint: str) -> tuple[int, set[str], list[dict[str, Any]]]:
    """How many requests there are, of which models, and what is wrong with them."""
    seen: dict[str, int] = {}
    models: set[str] = set()
    faults: list[dict[str, Any]] = []

    def fault(number: int | None, code: str, message: str, param: str | None = None) -> None:
        faults.append({"code": code, "line": number, "message": message, "param": param})

    with file_store.opened(file) as content:
        for number, text in enumerate(lines_of(content), 1):
            if not text.strip():
                continue
            if len(faults) >= MOST_FAULTS or len(seen) > MOST_REQUESTS:
                break
            try:
                line = batch_line(text, f"line {number}")
            except ForgearrError as error:
                fault(number, error.code.lower(), error.message)
                continue
            if line.custom_id in seen:
                first = seen[line.custom_id]
                fault(number, "duplicate_custom_id", f"The custom_id is that of line {first}.", "custom_id")
            if line.url != endpoint:
                fault(number, "mismatched_endpoint", f"The url is not the batch's endpoint, {endpoint}.", "url")
            seen[line.custom_id] = number
            models.add(str(line.body.get("model")))
    if len(seen) > MOST_REQUESTS:
        fault(None, "too_many_requests", f"A batch has {MOST_REQUESTS} requests at most.")
    if not seen and not faults:
        fault(None, "empty_file", "There is no request in the file.")
    return len(seen), models, faults


def _numbered(content: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that say something; only they are counted."""
    return enumerate((line for line in lines_of(content) if line.strip()), 1)


def _added(sum_: dict[str, Any] | None, usage: dict[str, Any]) -> dict[str, Any]:
    """What was used until now; chats and embeddings tell it in other words than responses do."""
    read = usage.get("input_tokens", usage.get("prompt_tokens", 0))
    said = usage.get("output_tokens", usage.get("completion_tokens", 0))
    details = usage.get("input_tokens_details", usage.get("prompt_tokens_details")) or {}
    before = sum_ or {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_tokens_details": {}}
    remembered = before["input_tokens_details"].get("cached_tokens", 0) + details.get("cached_tokens", 0)
    return {
        "input_tokens": before["input_tokens"] + read,
        "input_tokens_details": {"cached_tokens": remembered},
        "output_tokens": before["output_tokens"] + said,
        "output_tokens_details": {"reasoning_tokens": None},
        "total_tokens": before["total_tokens"] + read + said,
    }


async def _stop(working: set[asyncio.Task[Outcome]]) -> None:
    for task in working:
        task.cancel()
    await asyncio.gather(*working, return_exceptions=True)


def _part(batch_id: str, nonce: str, index: int, kind: str) -> str:
    return f"{folder(batch_id)}/{nonce}-{index:06d}-{kind}"


def _now() -> int:
    return int(time.time())
