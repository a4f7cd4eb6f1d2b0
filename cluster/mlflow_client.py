"""A client of MLflow's REST API, for the queue and the model registry.

It does not use MLflow's library, which takes seconds to import. Training code, in processes of its own, uses the
library. Files are streamed from and to the disk, whatever their size.
"""

import asyncio
import hashlib
import json
import logging
import re
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx

from cluster import secrets, storage
from cluster.errors import ForgearrError, Unavailable
from cluster.settings import get_settings

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 20
FILE_TIMEOUT_SECONDS = 900  # a server that stores files elsewhere copies them before it responds
FILE_ATTEMPTS = 4
CHUNK_BYTES = 4 * 1024 * 1024
PAGE_SIZE = 1000
MAX_RESPONSE_BYTES = 256 * 1024 * 1024
"""Of an API call. A page has up to a thousand versions, with tags of some kB each."""
MAX_MESSAGE_LENGTH = 300
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
MAX_VALUE_LENGTH = 6000  # of a parameter or tag, in characters; the server refuses more
MAX_PARAMETERS_PER_REQUEST = 100
MAX_METRICS_PER_REQUEST = 1000
INVALID_NAME_CHARACTERS = re.compile(r"[^\w .:/-]", re.ASCII)
"""Characters that MLflow does not allow in the name of a parameter."""
MAX_DIGEST_LENGTH = 36  # of a dataset, in characters

Result = TypeVar("Result")
OnBytes = Callable[[int], None]
"""Called with the bytes that were transferred so far. The count starts again when the transfer is retried."""


class MlflowUnavailable(Unavailable):
    """The MLflow server does not answer."""

    code = "MLFLOW_UNAVAILABLE"


class MlflowRefused(ForgearrError):
    """The MLflow server refused a request."""

    code = "MLFLOW_REFUSED"


class MlflowRestClient:
    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def find_or_create_experiment(self, name: str) -> str:
        """Return the id of the experiment with this name, which is created if it does not exist.

        One that was deleted on MLflow's page is restored: it keeps its name, and MLflow refuses new runs in it.
        """
        response = await self.call("GET", "experiments/get-by-name", default={}, params={"experiment_name": name})
        if not response:
            return (await self.call("POST", "experiments/create", json={"name": name}))["experiment_id"]
        experiment = response["experiment"]
        if experiment["lifecycle_stage"] == "deleted":
            log.warning("the experiment '%s' was deleted in MLflow, and is restored for the runs of new jobs", name)
            await self.call("POST", "experiments/restore", json={"experiment_id": experiment["experiment_id"]})
        return experiment["experiment_id"]

    async def find_or_create_run(
        self, experiment_id: str, job_id: str, started_at: datetime, tags: Mapping[str, str]
    ) -> str:
        """Return the id of this job's run. An interrupted earlier call may have created the run already."""
        query = {
            "experiment_ids": [experiment_id],
            "filter": f"tags.`forgearr.job_id` = '{job_id}'",
            "max_results": 1,
        }
        response = await self.call("POST", "runs/search", json=query)
        if runs := response.get("runs"):
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
        """Log metrics as (name, value, time, step). Logging the same one again has no effect."""
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
        """Record the dataset that a run uses. Recording the same one again has no effect."""
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
        run = await self.call("GET", "runs/get", params={"run_id": run_id})
        return run["run"]["info"]["artifact_uri"]

    async def upload(self, run_id: str, name: str, content: bytes | Path, on_bytes: OnBytes = lambda _: None) -> None:
        """Store an artifact through the server. An interrupted transfer is repeated."""
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
        """Download the artifact at `address` to the file `target`, and return its SHA-256."""
        path = _artifact_path(address)

        async def receive() -> str:
            digest = hashlib.sha256()
            received = 0
            with target.open("wb") as file:

                def write_chunk(data: bytes) -> None:
                    digest.update(data)
                    file.write(data)

                async with self._client.stream("GET", path, timeout=_file_timeout()) as response:
                    if not response.is_success:
                        start = await anext(response.aiter_bytes(MAX_MESSAGE_LENGTH), b"")
                        _raise_for_status(response, f"GET {path}", start)
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
        """Delete an artifact or a folder of artifacts. A missing one is no error."""
        with ExitStack() as held:
            await asyncio.to_thread(held.enter_context, storage.deletion())
            await self._delete_artifacts(address)

    async def _delete_artifacts(self, address: str) -> None:
        try:
            await self._request("DELETE", _artifact_path(address))
        except MlflowRefused as refusal:
            if refusal.details.get("status") != httpx.codes.NOT_FOUND:
                raise

    async def delete_run(self, run_id: str) -> None:
        """Delete a run and its artifacts. A missing one is no error."""
        run = await self.call("GET", "runs/get", default={}, params={"run_id": run_id})
        if not run:
            return
        address = run["run"]["info"]["artifact_uri"]
        if _is_served(address):
            await self.delete_artifacts(address)
        await self.call("POST", "runs/delete", json={"run_id": run_id})

    async def call(
        self, method: str, path: str, default: dict[str, Any] | None = None, **options: Any
    ) -> dict[str, Any]:
        """Make one API call and return its JSON, or `default` if the requested object does not exist."""
        try:
            content = await self._request(method, f"/api/2.0/mlflow/{path}", **options)
        except MlflowRefused as refusal:
            if default is not None and refusal.details.get("status") == httpx.codes.NOT_FOUND:
                return default
            raise
        try:
            document: Any = json.loads(content)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise MlflowUnavailable("The program at mlflow.tracking_uri does not answer as an MLflow server does.")
        return cast(dict[str, Any], document)

    async def search(self, path: str, key: str, condition: str = "") -> list[dict[str, Any]]:
        """Return all results of a GET search, from all its pages. They are under `key` in each response."""
        rows: list[dict[str, Any]] = []
        params: dict[str, Any] = {"max_results": PAGE_SIZE, **({"filter": condition} if condition else {})}
        while True:
            response = await self.call("GET", path, params=params)
            rows += response.get(key, [])
            token = response.get("next_page_token")
            if not token:
                return rows
            if token == params.get("page_token"):
                raise MlflowUnavailable("The MLflow server sends the same page again and again.")
            params["page_token"] = token

    async def _request(self, method: str, path: str, **options: Any) -> bytes:
        """Send a request, and return the content of its response.

        Every failure is raised as MlflowUnavailable or MlflowRefused.
        """
        content = bytearray()
        with _translated_errors():
            async with self._client.stream(method, path, **options) as response:
                if "," in response.headers.get("content-encoding", ""):
                    raise MlflowUnavailable("The MLflow server sent a response that is compressed more than once.")
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > MAX_RESPONSE_BYTES:
                        limit = MAX_RESPONSE_BYTES // 1024 // 1024
                        raise MlflowUnavailable(f"The MLflow server sent more than {limit} MiB.")
        _raise_for_status(response, f"{method} {path}", bytes(content))
        return bytes(content)


def _file_timeout() -> httpx.Timeout:
    return httpx.Timeout(TIMEOUT_SECONDS, read=FILE_TIMEOUT_SECONDS)


@asynccontextmanager
async def connect(uri: str) -> AsyncGenerator[MlflowRestClient]:
    auth = _own_credentials(uri)
    async with httpx.AsyncClient(base_url=uri, auth=auth, timeout=TIMEOUT_SECONDS, verify=_certificates()) as client:
        yield MlflowRestClient(client)


def flatten(document: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Turn nested mappings into dotted names, as for parameters: {'a': {'b': 1}} becomes {'a.b': 1}."""
    flat: dict[str, object] = {}
    for name, value in document.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _own_credentials(uri: str) -> httpx.Auth | None:
    """Return the credentials for the MLflow of this installation. Those for another server are in its URL."""
    settings = get_settings()
    if not settings.has_own_mlflow or uri != settings.mlflow_uri:
        return None
    return httpx.BasicAuth(secrets.MLFLOW_USER, secrets.mlflow_password())


@cache
def _certificates() -> ssl.SSLContext:
    """Cached, because reading the certificates takes 15 ms."""
    return httpx.create_ssl_context()


@contextmanager
def _translated_errors() -> Generator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise MlflowUnavailable(f"The MLflow server does not answer: {type(error).__name__}.") from error


def _raise_for_status(response: httpx.Response, request: str, content: bytes) -> None:
    if response.is_redirect:
        raise MlflowUnavailable("The MLflow server redirects to another address: set mlflow.tracking_uri to that one.")
    if response.status_code >= 500 or response.status_code == 429:
        raise MlflowUnavailable(f"The MLflow server answered {response.status_code}.")
    if response.is_error:
        text = content[:MAX_MESSAGE_LENGTH].decode(errors="replace")
        message = f"MLflow answered {response.status_code} to {request}: {text}"
        raise MlflowRefused(message, details={"status": response.status_code})


def _is_served(address: str) -> bool:
    """Whether clients read and write this artifact through the server."""
    return address.startswith("mlflow-artifacts:/")


def _artifact_path(address: str) -> str:
    """Return the path under which the server reads and writes an artifact."""
    if not _is_served(address):
        raise MlflowRefused(f"The MLflow server does not serve artifacts itself; it stores them in {address}.")
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
    """Call `attempt` up to FILE_ATTEMPTS times, with growing delays, while the server is unavailable."""
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
