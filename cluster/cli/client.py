"""The HTTP client with which commands call the REST API of a running server."""

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import typer

from cluster.errors import ForgearrError, Unavailable

CONNECT_SECONDS = 30
MAX_WAIT_SECONDS = 120
"""How long to wait for a server that does not answer."""
RETRY_SECONDS = 2.0


class RequestRefused(ForgearrError):
    """The server refused the request."""

    status = 400


class RetryLater(RequestRefused):
    """The server cannot answer now: a rate limit is exceeded, or a part of it is unavailable."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.wait_seconds = seconds


class ServerUnreachable(Unavailable):
    """The server does not answer."""


class RetryPolicy:
    """Waits while the server limits requests or restarts, up to MAX_WAIT_SECONDS. It prints one message."""

    def __init__(self) -> None:
        self._has_connected = False
        self._deadline: float | None = None

    def reset(self) -> None:
        self._has_connected, self._deadline = True, None

    def wait(self, error: RetryLater | ServerUnreachable) -> None:
        """Sleep before the next try. Raises the error when the time is up, or if the server has never answered."""
        if isinstance(error, ServerUnreachable) and not self._has_connected:
            raise error
        if self._deadline is None:
            self._deadline = time.monotonic() + MAX_WAIT_SECONDS
            typer.echo(f"{error.message} Trying again for {MAX_WAIT_SECONDS} s …", err=True)
        delay = error.wait_seconds if isinstance(error, RetryLater) else RETRY_SECONDS
        if time.monotonic() + delay > self._deadline:
            raise error
        time.sleep(delay)


def poll(path: str, retry_policy: RetryPolicy) -> Any:
    """Send a GET that is repeated while the server limits requests or restarts."""
    while True:
        try:
            result = call("GET", path)
        except (RetryLater, ServerUnreachable) as error:
            retry_policy.wait(error)
        else:
            retry_policy.reset()
            return result


def call(method: str, path: str, *, headers: dict[str, str] | None = None, **options: Any) -> Any:
    """Send one request and return its JSON. An error response is raised with the server's message."""
    import httpx

    with _client() as client:
        try:
            response = client.request(method, path, headers=headers, **options)
        except httpx.HTTPError as error:
            raise _unreachable_error(error) from error
        return _parse_response(response)


def stream_events(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the server-sent events of a path, as (type, data). An interrupted stream is resumed where it stopped."""
    import httpx

    last_id = ""
    retry_policy = RetryPolicy()
    while True:
        headers = {"Last-Event-ID": last_id} if last_id else {}
        with _client() as client:
            try:
                with client.stream("GET", path, params={"follow": "1"}, headers=headers) as response:
                    if response.is_error:
                        response.read()
                        _parse_response(response)
                    retry_policy.reset()
                    for event_id, event_type, data in _parse_events(response.iter_lines()):
                        last_id = event_id
                        yield event_type, data
                    return
            except httpx.RemoteProtocolError:
                continue  # the gateway was replaced during the stream
            except httpx.HTTPError as error:
                retry_policy.wait(_unreachable_error(error))
            except RetryLater as error:
                retry_policy.wait(error)


def stream(path: str, body: Any) -> Iterator[dict[str, Any]]:
    """Yield the chunks of a streamed response to a POST, until [DONE]."""
    import httpx

    with _client() as client:
        try:
            # There is no limit for reading: to load a model, or to begin an answer, may take long.
            with client.stream("POST", path, json=body, timeout=httpx.Timeout(CONNECT_SECONDS, read=None)) as response:
                if response.is_error:
                    response.read()
                    _parse_response(response)
                for line in response.iter_lines():
                    data = line.removeprefix("data: ")
                    if data == "[DONE]":
                        return
                    if data:
                        yield json.loads(data)
        except httpx.HTTPError as error:
            raise _unreachable_error(error) from error


def server_url() -> str:
    from cluster.runtime import run_state

    return os.environ.get("FORGEARR_URL") or run_state.current_url()


def _client() -> Any:
    import httpx

    key = os.environ.get("FORGEARR_API_KEY")
    timeout = httpx.Timeout(MAX_WAIT_SECONDS, connect=CONNECT_SECONDS)
    return httpx.Client(base_url=server_url(), timeout=timeout, headers={"X-API-Key": key} if key else {})


def _parse_response(response: Any) -> Any:
    if response.is_success:
        return response.json() if response.content else None
    try:
        error_body = response.json()
        message = error_body["message"] if "message" in error_body else error_body["detail"]  # `detail` under /v1
    except (ValueError, KeyError, TypeError):
        message = f"{response.request.url} answered {response.status_code}."
    if response.status_code == 401 and "FORGEARR_API_KEY" not in os.environ:
        message += " Set FORGEARR_API_KEY to your API key."
    if response.status_code in {429, 503}:
        raise RetryLater(message, _retry_after(response))
    raise RequestRefused(message)


def _retry_after(response: Any) -> float:
    try:
        return max(1.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return RETRY_SECONDS


def _parse_events(lines: Iterator[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    fields: dict[str, str] = {}
    for line in lines:
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
        elif not line and "data" in fields:
            yield fields.get("id", ""), fields.get("event", "message"), json.loads(fields["data"])
            fields = {}


def _unreachable_error(error: Exception) -> ServerUnreachable:
    return ServerUnreachable(
        f"Nothing answers at {server_url()} ({type(error).__name__}); `forgearr up` starts the server."
    )
