"""MLflow, as far as the queue needs it: its REST API, spoken without its library, which takes seconds to import.

Training code, which lives in processes of its own, uses the library.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import httpx

from cluster.errors import ForgearrError, Unavailable

TIMEOUT_SECONDS = 20
LONGEST_VALUE = 6000  # of a parameter or tag, in characters; the server refuses more
MOST_PARAMETERS = 100  # in one request
MOST_METRICS = 1000


class TrackingUnavailable(Unavailable):
    """The MLflow server does not answer."""

    code = "MLFLOW_UNAVAILABLE"


class TrackingRefused(ForgearrError):
    """The MLflow server refused a request."""

    code = "MLFLOW_REFUSED"


class Tracking:
    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._experiments: dict[str, str] = {}

    async def experiment(self, name: str) -> str:
        """The id of the experiment of this name, which is made when it is missing."""
        if name not in self._experiments:
            found = await self._call("GET", "experiments/get-by-name", missing={}, params={"experiment_name": name})
            if not found:
                found = {"experiment": await self._call("POST", "experiments/create", json={"name": name})}
            self._experiments[name] = found["experiment"]["experiment_id"]
        return self._experiments[name]

    async def run_of_job(self, experiment_id: str, job_id: str, started_at: datetime, tags: Mapping[str, str]) -> str:
        """The run of this job: found, when an earlier attempt to follow it got that far, else made."""
        wanted = {
            "experiment_ids": [experiment_id],
            "filter": f"tags.`forgearr.job_id` = '{job_id}'",
            "max_results": 1,
        }
        found = await self._call("POST", "runs/search", json=wanted)
        if runs := found.get("runs"):
            return runs[0]["info"]["run_id"]
        made = await self._call(
            "POST",
            "runs/create",
            json={
                "experiment_id": experiment_id,
                "run_name": job_id,
                "start_time": _milliseconds(started_at),
                "tags": _pairs({**tags, "forgearr.job_id": job_id}),
            },
        )
        return made["run"]["info"]["run_id"]

    async def log_parameters(self, run_id: str, parameters: Mapping[str, object]) -> None:
        for page in _pages(_pairs(parameters), MOST_PARAMETERS):
            await self._call("POST", "runs/log-batch", json={"run_id": run_id, "params": page})

    async def log_metrics(self, run_id: str, metrics: Sequence[tuple[str, float, datetime, int]]) -> None:
        """(name, value, time, step) of each; the same one told twice counts once."""
        rows = [
            {"key": name, "value": value, "timestamp": _milliseconds(moment), "step": step}
            for name, value, moment, step in metrics
        ]
        for page in _pages(rows, MOST_METRICS):
            await self._call("POST", "runs/log-batch", json={"run_id": run_id, "metrics": page})

    async def set_tags(self, run_id: str, tags: Mapping[str, object]) -> None:
        await self._call("POST", "runs/log-batch", json={"run_id": run_id, "tags": _pairs(tags)})

    async def set_status(self, run_id: str, status: str, ended_at: datetime | None) -> None:
        ending = {"end_time": _milliseconds(ended_at)} if ended_at else {}
        await self._call("POST", "runs/update", json={"run_id": run_id, "status": status, **ending})

    async def upload(self, run_id: str, name: str, content: bytes) -> None:
        """Store an artifact through the server."""
        run = await self._call("GET", "runs/get", params={"run_id": run_id})
        root: str = run["run"]["info"]["artifact_uri"]
        if not root.startswith("mlflow-artifacts:/"):
            raise TrackingRefused(f"The MLflow server does not take artifacts itself; it keeps them in {root}.")
        folder = root.removeprefix("mlflow-artifacts:").lstrip("/")
        await self._request("PUT", f"/api/2.0/mlflow-artifacts/artifacts/{folder}/{name}", content=content)

    async def _call(
        self, method: str, path: str, missing: dict[str, Any] | None = None, **options: Any
    ) -> dict[str, Any]:
        """One API call; `missing` is the answer when the thing asked for does not exist."""
        try:
            answer = await self._request(method, f"/api/2.0/mlflow/{path}", **options)
        except TrackingRefused as refusal:
            if missing is not None and refusal.details.get("status") == httpx.codes.NOT_FOUND:
                return missing
            raise
        return answer.json()

    async def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """The one line of defence: what goes wrong below is one of our two errors above."""
        try:
            answer = await self._client.request(method, path, **options)
        except httpx.HTTPError as error:
            raise TrackingUnavailable(f"The MLflow server does not answer: {type(error).__name__}.") from error
        if answer.status_code >= 500 or answer.status_code == 429:
            raise TrackingUnavailable(f"The MLflow server answered {answer.status_code}.")
        if answer.is_error:
            message = f"MLflow answered {answer.status_code} to {method} {path}: {answer.text[:300]}"
            raise TrackingRefused(message, details={"status": answer.status_code})
        return answer


@asynccontextmanager
async def connect(uri: str) -> AsyncGenerator[Tracking]:
    async with httpx.AsyncClient(base_url=uri, timeout=TIMEOUT_SECONDS) as client:
        yield Tracking(client)


def flatten(document: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """{'a': {'b': 1}} as {'a.b': 1}: how a spec becomes parameters."""
    flat: dict[str, object] = {}
    for name, value in document.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _pairs(values: Mapping[str, object]) -> list[dict[str, str]]:
    return [{"key": name, "value": str(value)[:LONGEST_VALUE]} for name, value in values.items()]


def _pages(rows: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)
