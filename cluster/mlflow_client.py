"""MLflow, as far as the queue and the registry need it: its REST API, spoken without its library, which takes seconds
to import.

Training code, which lives in processes of its own, uses the library. Files go straight from and to the disk, whatever
their size.
"""

import asyncio
import hashlib
import json
import re
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import httpx

from cluster.errors import ForgearrError, Unavailable

TIMEOUT_SECONDS = 20
FILE_TIMEOUT_SECONDS = 900  # a server that keeps files elsewhere copies them first
FILE_ATTEMPTS = 4
CHUNK_BYTES = 4 * 1024 * 1024
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
MAX_VALUE_LENGTH = 6000  # of a parameter or tag, in characters; the server refuses more
MAX_PARAMETERS_PER_REQUEST = 100  # in one request
MAX_METRICS_PER_REQUEST = 1000
INVALID_NAME_CHARACTERS = re.compile(r"[^\w .:/-]", re.ASCII)
"""What the name of a parameter may not have."""
MAX_DIGEST_LENGTH = 36  # of a dataset, in characters

Result = TypeVar("Result")
OnBytes = Callable[[int], None]
"""Hears how many bytes of a file have passed so far; fewer again when it starts anew."""


class MlflowUnavailable(Unavailable):
    """The MLflow server does not answer."""

    code = "MLFLOW_UNAVAILABLE"


class MlflowRefused(ForgearrError):
    """The MLflow server refused a request."""

    code = "MLFLOW_REFUSED"


class MlflowRestClient:
    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._experiments: dict[str, str] = {}

    async def find_or_create_experiment(self, name: str) -> str:
        """The id of the experiment of this name, which is made when it is missing."""
        if name not in self._experiments:
            found = await self.call("GET", "experiments/get-by-name", default={}, params={"experiment_name": name})
            if not found:
                found = {"experiment": await self.call("POST", "experiments/create", json={"name": name})}
            self._experiments[name] = found["experiment"]["experiment_id"]
        return self._experiments[name]

    async def find_or_create_run(
        self, experiment_id: str, job_id: str, started_at: datetime, tags: Mapping[str, str]
    ) -> str:
        """The run of this job: found, when an earlier attempt to follow it got that far, else made."""
        query = {
            "experiment_ids": [experiment_id],
            "filter": f"tags.`forgearr.job_id` = '{job_id}'",
            "max_results": 1,
        }
        found = await self.call("POST", "runs/search", json=query)
        if runs := found.get("runs"):
            return runs[0]["info"]["run_id"]
        created = await self.call(
            "POST",
            "runs/create",
            json={
                "experiment_id": experiment_id,
                "run_name": job_id,
                "start_time": _milliseconds(started_at),
                "tags": _key_value_pairs({**tags, "forgearr.job_id": job_id}),
            },
        )
        return created["run"]["info"]["run_id"]

    async def log_parameters(self, run_id: str, parameters: Mapping[str, object]) -> None:
        sanitized = {INVALID_NAME_CHARACTERS.sub("_", name): value for name, value in parameters.items()}
        for batch in _batches(_key_value_pairs(sanitized), MAX_PARAMETERS_PER_REQUEST):
            await self.call("POST", "runs/log-batch", json={"run_id": run_id, "params": batch})

    async def log_metrics(self, run_id: str, metrics: Sequence[tuple[str, float, datetime, int]]) -> None:
        """(name, value, time, step) of each; the same one told twice counts once."""
        rows = [
            {"key": name, "value": value, "timestamp": _milliseconds(moment), "step": step}
            for name, value, moment, step in metrics
        ]
        for batch in _batches(rows, MAX_METRICS_PER_REQUEST):
            await self.call("POST", "runs/log-batch", json={"run_id": run_id, "metrics": batch})

    async def set_tags(self, run_id: str, tags: Mapping[str, object]) -> None:
        await self.call("POST", "runs/log-batch", json={"run_id": run_id, "tags": _key_value_pairs(tags)})

    async def set_status(self, run_id: str, status: str, ended_at: datetime | None) -> None:
        end_time = {"end_time": _milliseconds(ended_at)} if ended_at else {}
        await self.call("POST", "runs/update", json={"run_id": run_id, "status": status, **end_time})

    async def log_input(
        self, run_id: str, *, name: str, digest: str, source: str, profile: Mapping[str, object]
    ) -> None:
        """The data that a run works on; the same one told twice counts once."""
        dataset = {
            "name": name,
            "digest": digest[:MAX_DIGEST_LENGTH],
            "source_type": "forgearr",
            "source": source,
            "profile": json.dumps(profile),
        }
        inputs = [{"dataset": dataset, "tags": _key_value_pairs({"mlflow.data.context": "training"})}]
        await self.call("POST", "runs/log-inputs", json={"run_id": run_id, "datasets": inputs})

    async def artifact_uri(self, run_id: str) -> str:
        """The address of a run's artifacts, which its server must keep itself."""
        run = await self.call("GET", "runs/get", params={"run_id": run_id})
        return run["run"]["info"]["artifact_uri"]

    async def upload(self, run_id: str, name: str, content: bytes | Path, on_bytes: OnBytes = lambda _: None) -> None:
        """Store an artifact through the server. A file that breaks off on its way is sent again."""
        target = f"{_artifact_path(await self.artifact_uri(run_id))}/{name}"

        async def send() -> None:
            if isinstance(content, bytes):
                await self._request("PUT", target, content=content)
                return
            headers = {"Content-Length": str(_size(content))}
            chunks = _chunks(content, on_bytes)
            await self._request("PUT", target, content=chunks, headers=headers, timeout=_file_timeout())

        await _with_retries(send)

    async def download(self, address: str, target: Path, on_bytes: OnBytes = lambda _: None) -> str:
        """Store the artifact at `address` in the file `target`; returns its SHA-256."""
        path = _artifact_path(address)

        async def receive() -> str:
            digest = hashlib.sha256()
            received = 0
            with target.open("wb") as file:

                def write_chunk(data: bytes) -> None:
                    digest.update(data)
                    file.write(data)

                async with self._client.stream("GET", path, timeout=_file_timeout()) as response:
                    if response.is_error:
                        await response.aread()
                    _raise_for_status(response, f"GET {path}")
                    async for chunk in response.aiter_bytes(CHUNK_BYTES):
                        await asyncio.to_thread(write_chunk, chunk)
                        received += len(chunk)
                        on_bytes(received)
            return digest.hexdigest()

        async def receive_guarded() -> str:
            with _translated_errors():
                return await receive()

        return await _with_retries(receive_guarded)

    async def delete_artifacts(self, address: str) -> None:
        """Remove an artifact, or a folder of them."""
        try:
            await self._request("DELETE", _artifact_path(address))
        except MlflowRefused as refusal:
            if refusal.details.get("status") != httpx.codes.NOT_FOUND:
                raise

    async def call(
        self, method: str, path: str, default: dict[str, Any] | None = None, **options: Any
    ) -> dict[str, Any]:
        """One API call; `missing` is the answer when the thing asked for does not exist."""
        try:
            response = await self._request(method, f"/api/2.0/mlflow/{path}", **options)
        except MlflowRefused as refusal:
            if default is not None and refusal.details.get("status") == httpx.codes.NOT_FOUND:
                return default
            raise
        return response.json()

    async def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The one line of defence: what goes wrong below is one of our two errors above."""
        with _translated_errors():
            response = await self._client.request(method, path, **options)
        _raise_for_status(response, f"{method} {path}")
        return response


def _file_timeout() -> httpx.Timeout:
    return httpx.Timeout(TIMEOUT_SECONDS, read=FILE_TIMEOUT_SECONDS)


@asynccontextmanager
async def connect(uri: str) -> AsyncGenerator[MlflowRestClient]:
    async with httpx.AsyncClient(base_url=uri, timeout=TIMEOUT_SECONDS, verify=_certificates()) as client:
        yield MlflowRestClient(client)


def flatten(document: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """{'a': {'b': 1}} as {'a.b': 1}: how a spec becomes parameters."""
    flat: dict[str, object] = {}
    for name, value in document.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


@cache
def _certificates() -> ssl.SSLContext:
    """Read once: it takes 15 ms."""
    return httpx.create_ssl_context()


@contextmanager
def _translated_errors() -> Generator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise MlflowUnavailable(f"The MLflow server does not answer: {type(error).__name__}.") from error


def _raise_for_status(response: httpx.Response, request: str) -> None:
    if response.status_code >= 500 or response.status_code == 429:
        raise MlflowUnavailable(f"The MLflow server answered {response.status_code}.")
    if response.is_error:
        message = f"MLflow answered {response.status_code} to {request}: {response.text[:300]}"
        raise MlflowRefused(message, details={"status": response.status_code})


def _artifact_path(address: str) -> str:
    """Where the server hands out, and takes, an artifact."""
    if not address.startswith("mlflow-artifacts:/"):
        raise MlflowRefused(f"The MLflow server does not hold artifacts itself; it keeps them in {address}.")
    return f"{ARTIFACTS}/{address.removeprefix('mlflow-artifacts:').lstrip('/')}"


def _size(path: Path) -> int:
    return path.stat().st_size


async def _chunks(path: Path, on_bytes: OnBytes) -> AsyncGenerator[bytes]:
    sent = 0
    with path.open("rb") as file:
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield chunk
            sent += len(chunk)
            on_bytes(sent)


async def _with_retries(attempt: Callable[[], Awaitable[Result]]) -> Result:
    """The transfer of a file, begun again when the connection drops."""
    for number in range(1, FILE_ATTEMPTS):
        try:
            return await attempt()
        except MlflowUnavailable:
            await asyncio.sleep(0.25 * 2**number)
    return await attempt()


def _key_value_pairs(values: Mapping[str, object]) -> list[dict[str, str]]:
    return [{"key": name, "value": str(value)[:MAX_VALUE_LENGTH]} for name, value in values.items()]


def _batches(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)
