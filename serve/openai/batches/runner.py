"""Runs a batch: executes its lines concurrently, and commits the results in parts.

A part is written to storage first. Then a checkpoint makes it valid, and records which lines it has. The next attempt
continues from the last checkpoint: a line may be executed again, but has one result. Each attempt has its own names for
parts, so a worker that lost its lease cannot change the parts of its successor.
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

from cluster import identity, storage
from cluster.db import Database, now, run_with_database
from cluster.errors import ForgearrError
from cluster.files import store as file_store
from cluster.files.tables import File
from cluster.ownership import LOCAL, Principal
from cluster.settings import get_settings
from jobs.context import Context
from pipelines.training.data.parsing import read_lines
from serve.engines.factory import build_engine
from serve.engines.protocol import Engine
from serve.openai.batches.line import LineResult, LineRunner, expired_result
from serve.openai.batches.store import Batch, BatchNotFound, find, parts_folder
from serve.openai.files.validation import MAX_REQUESTS, BatchLine, parse_batch_line

COMMIT_LINES = 100
COMMIT_SECONDS = 5.0
POLL_SECONDS = 1.0
"""Interval of the checks whether the batch was cancelled or has expired."""
MAX_ERRORS = 100
OUTPUT_FILE, ERROR_FILE = "output", "errors"


def run(context: Context, batch_id: str, engine: Engine | None = None) -> dict[str, Any]:
    """Execute the whole batch; returns the final fields of its public form."""
    return run_with_database(
        lambda database: _run_batch(context, database, batch_id, engine or build_engine(separate_loop=True))
    )


async def _run_batch(context: Context, database: Database, batch_id: str, engine: Engine) -> dict[str, Any]:
    async with database.read_transaction() as session:
        batch, file, principal = await _load(session, context, batch_id)
    run = _BatchRun(context, database, batch, file, principal)
    if context.checkpoint_state is None and (errors := await run.validate()):
        return {"status": "failed", "failed_at": _now(), "errors": errors}
    if run.state["ending"] is None:
        await run.run_lines(LineRunner(database, engine, principal))
    return await run.finish()


async def _load(session: AsyncSession, context: Context, batch_id: str) -> tuple[Batch, File, Principal]:
    batch = await find(session, batch_id, LOCAL)
    if batch.job_id != context.job_id:
        raise BatchNotFound(f"There is no batch '{batch_id}' for this job.")
    principal = await identity.find_principal(session, batch.owner_id, batch.created_by)
    return batch, await file_store.find(session, batch.input_file_id, principal), principal


class _BatchRun:
    """One attempt at a batch. Checkpoints save `state`."""

    def __init__(self, context: Context, database: Database, batch: Batch, file: File, principal: Principal) -> None:
        self.state: dict[str, Any] = context.checkpoint_state
        self._context = context
        self._database = database
        self._batch = batch
        self._file = file
        self._principal = principal
        self._nonce = token_hex(4)
        self._results: list[LineResult] = []
        self._committed_at = time.monotonic()

    async def validate(self) -> list[dict[str, Any]]:
        """The errors in the file. If there are none, the batch is marked as in progress."""
        self._context.report(phase="validating")
        total, models, errors = await asyncio.to_thread(_validate_file, self._file, self._batch.endpoint)
        if errors:
            return errors
        counts = {"total": total, "completed": 0, "failed": 0}
        snapshot = {"status": "in_progress", "in_progress_at": _now(), "request_counts": counts, "usage": None}
        model = models.pop() if len(models) == 1 else None
        self.state = {"told": {**snapshot, "model": model}, "ending": None, "first": 1, "done": [], "parts": []}
        await self._save()
        return []

    async def run_lines(self, runner: LineRunner) -> None:
        """Execute lines until all have a result, or until the batch is cancelled or expires."""
        settings = get_settings().engines
        max_concurrency = settings.slots * max(settings.replicas, 1)
        lines = self._pending_lines()
        running: set[asyncio.Task[LineResult]] = set()
        ending, polled_at, more = None, 0.0, True
        try:
            while ending is None:
                while more and len(running) < max_concurrency:
                    if (line := await anext(lines, None)) is None:
                        more = False
                    else:
                        running.add(asyncio.create_task(runner.run(*line)))
                if not running:
                    break
                done, running = await asyncio.wait(running, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                self._results += [task.result() for task in done]
                if self._is_commit_due():
                    await self._commit()
                if time.monotonic() - polled_at >= POLL_SECONDS:
                    ending, polled_at = await self._requested_ending(), time.monotonic()
        finally:
            await _cancel_all(running)
            await lines.aclose()
        await self._commit()
        if ending == "expired":
            await self._expire_remaining()
        self.state["ending"] = ending or "completed"
        self.state["told"] |= {"status": "finalizing", "finalizing_at": _now()}
        await self._save()

    async def finish(self) -> dict[str, Any]:
        """Join the parts to files. Their ids are fixed, so a later attempt creates no second ones."""
        self._context.report(phase="finalizing")
        counts, ending = self.state["told"]["request_counts"], self.state["ending"]
        output = await self._save_file(OUTPUT_FILE) if counts["completed"] else None
        errors = await self._save_file(ERROR_FILE) if counts["failed"] else None
        await asyncio.to_thread(storage.remove, storage.address(parts_folder(self._batch.id)))
        snapshot = {**self.state["told"], "output_file_id": output, "error_file_id": errors}
        return {**snapshot, "status": ending, f"{ending}_at": _now()}

    async def _pending_lines(self) -> AsyncGenerator[tuple[int, BatchLine]]:
        """The lines that have no result yet."""
        finished = set(self.state["done"])
        with await asyncio.to_thread(file_store.open_file, self._file) as content:
            numbered = _numbered_lines(content)
            while (line := await asyncio.to_thread(next, numbered, None)) is not None:
                number, text = line
                if number >= self.state["first"] and number not in finished:
                    yield number, parse_batch_line(text, f"line {number}")

    def _is_commit_due(self) -> bool:
        if self._context.should_stop():
            return True
        is_overdue = time.monotonic() - self._committed_at >= COMMIT_SECONDS
        return len(self._results) >= COMMIT_LINES or bool(self._results and is_overdue)

    async def _requested_ending(self) -> str | None:
        async with self._database.read_transaction() as session:
            batch = await find(session, self._batch.id, LOCAL)
        if batch.cancelling_at is not None:
            return "cancelled"
        return "expired" if batch.expires_at <= now() else None

    async def _expire_remaining(self) -> None:
        async for number, line in self._pending_lines():
            self._results.append(expired_result(number, line))
            if len(self._results) >= COMMIT_LINES:
                await self._commit()
        await self._commit()

    async def _commit(self) -> None:
        """Write the collected results as a part, and make it valid with a checkpoint."""
        results, self._results, self._committed_at = self._results, [], time.monotonic()
        if results:
            index = self._begin_part()
            for kind, succeeded in ((OUTPUT_FILE, True), (ERROR_FILE, False)):
                lines = b"".join(result.line for result in results if result.succeeded == succeeded)
                if lines:
                    name = _part(self._batch.id, self._nonce, index, kind)
                    await asyncio.to_thread(storage.write, BytesIO(lines), name)
            self._record_results(results)
        await self._save()

    def _begin_part(self) -> int:
        """The number of this attempt's next part. The state has the number of parts of each attempt."""
        parts = self.state["parts"]
        if not parts or parts[-1][0] != self._nonce:
            parts.append([self._nonce, 0])
        parts[-1][1] += 1
        return parts[-1][1] - 1

    def _record_results(self, results: list[LineResult]) -> None:
        snapshot, done = self.state["told"], {*self.state["done"], *(result.number for result in results)}
        counts = snapshot["request_counts"]
        for result in results:
            counts["completed" if result.succeeded else "failed"] += 1
            if result.usage is not None:
                snapshot["usage"] = _add_usage(snapshot["usage"], result.usage)
        while self.state["first"] in done:
            done.remove(self.state["first"])
            self.state["first"] += 1
        self.state["done"] = sorted(done)
        answered = counts["completed"] + counts["failed"]
        self._context.report(progress=100 * answered / counts["total"], phase=f"{answered} of {counts['total']}")

    async def _save(self) -> None:
        await asyncio.to_thread(self._context.checkpoint, self.state)

    async def _save_file(self, kind: str) -> str:
        file_id = f"file-{self._batch.id.removeprefix('batch_')}-{kind}"
        seconds = self._batch.output_seconds
        with tempfile.TemporaryFile() as output:
            await asyncio.to_thread(self._join_parts, kind, output)
            file = await file_store.create_file(
                self._database,
                output,
                filename=f"{self._batch.id}_{kind}.jsonl",
                purpose="batch_output",
                principal=self._principal,
                lifetime=None if seconds is None else timedelta(seconds=seconds),
                file_id=file_id,
            )
        return file.id

    def _join_parts(self, kind: str, output: BinaryIO) -> None:
        for nonce, count in self.state["parts"]:
            for index in range(count):
                address = storage.address(_part(self._batch.id, nonce, index, kind))
                if storage.exists(address):
                    with storage.open_file(address) as part:
                        shutil.copyfileobj(part, output)
        output.seek(0)


def _validate_file(file: File, endpoint: str) -> tuple[int, set[str], list[dict[str, Any]]]:
    """The number of requests, their models, and the errors in the file."""
    line_by_custom_id: dict[str, int] = {}
    models: set[str] = set()
    errors: list[dict[str, Any]] = []

    def add_error(number: int | None, code: str, message: str, param: str | None = None) -> None:
        errors.append({"code": code, "line": number, "message": message, "param": param})

    with file_store.open_file(file) as content:
        for number, text in enumerate(read_lines(content), 1):
            if not text.strip():
                continue
            if len(errors) >= MAX_ERRORS or len(line_by_custom_id) > MAX_REQUESTS:
                break
            try:
                line = parse_batch_line(text, f"line {number}")
            except ForgearrError as error:
                add_error(number, error.code.lower(), error.message)
                continue
            if line.custom_id in line_by_custom_id:
                first = line_by_custom_id[line.custom_id]
                add_error(number, "duplicate_custom_id", f"The custom_id is that of line {first}.", "custom_id")
            if line.url != endpoint:
                add_error(number, "mismatched_endpoint", f"The url is not the batch's endpoint, {endpoint}.", "url")
            line_by_custom_id[line.custom_id] = number
            models.add(str(line.body.get("model")))
    if len(line_by_custom_id) > MAX_REQUESTS:
        add_error(None, "too_many_requests", f"A batch has {MAX_REQUESTS} requests at most.")
    if not line_by_custom_id and not errors:
        add_error(None, "empty_file", "There is no request in the file.")
    return len(line_by_custom_id), models, errors


def _numbered_lines(content: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers. Empty lines are skipped and not counted."""
    return enumerate((line for line in read_lines(content) if line.strip()), 1)


def _add_usage(total: dict[str, Any] | None, usage: dict[str, Any]) -> dict[str, Any]:
    """Add a usage to the total. Responses name the fields differently from chats and embeddings."""
    input_tokens = usage.get("input_tokens", usage.get("prompt_tokens", 0))
    output_tokens = usage.get("output_tokens", usage.get("completion_tokens", 0))
    details = usage.get("input_tokens_details", usage.get("prompt_tokens_details")) or {}
    total = total or {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_tokens_details": {}}
    cached_tokens = total["input_tokens_details"].get("cached_tokens", 0) + details.get("cached_tokens", 0)
    return {
        "input_tokens": total["input_tokens"] + input_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens},
        "output_tokens": total["output_tokens"] + output_tokens,
        "output_tokens_details": {"reasoning_tokens": None},
        "total_tokens": total["total_tokens"] + input_tokens + output_tokens,
    }


async def _cancel_all(tasks: set[asyncio.Task[LineResult]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _part(batch_id: str, nonce: str, index: int, kind: str) -> str:
    return f"{parts_folder(batch_id)}/{nonce}-{index:06d}-{kind}"


def _now() -> int:
    return int(time.time())
