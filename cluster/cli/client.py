"""The command line's way to a running server: its REST API."""

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import typer

from cluster.errors import ForgearrError, Unavailable

CONNECT_SECONDS = 30
PATIENCE_SECONDS = 120
"""How long a server that does not answer is waited for."""
RETRY_SECONDS = 2.0


class Refused(ForgearrError):
    """The server refused."""

    status = 400


class Later(Refused):
    """The server has no answer now: too much was asked of it, or a part of it is missing."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class Unreachable(Unavailable):
    """Nothing answers where the server should be."""


class Patience:
    """Waits while the server limits its clients or is being replaced, but not for ever, and says so once."""

    def __init__(self) -> None:
        self._answered = False
        self._until: float | None = None

    def answered(self) -> None:
        self._answered, self._until = True, None

    def wait(self, error: Later | Unreachable) -> None:
        """Raises the error when it is time to give up: at once where nothing has ever answered."""
        if isinstance(error, Unreachable) and not self._answered:
            raise error
        if self._until is None:
            self._until = time.monotonic() + PATIENCE_SECONDS
            typer.echo(f"{error.message} Trying again for {PATIENCE_SECONDS} s …", err=True)
        pause = error.seconds if isinstance(error, Later) else RETRY_SECONDS
        if time.monotonic() + pause > self._until:
            raise error
        time.sleep(pause)


def look(path: str, patience: Patience) -> Any:
    """A GET of somebody who watches, and so asks again and again."""
    while True:
        try:
            found = call("GET", path)
        except (Later, Unreachable) as error:
            patience.wait(error)
        else:
            patience.answered()
            return found


def call(method: str, path: str, *, headers: dict[str, str] | None = None, **options: Any) -> Any:
    """One request; returns its JSON. What the server says against it becomes the command's error."""
    import httpx

    with _client() as client:
        try:
            answer = client.request(method, path, headers=headers, **options)
        except httpx.HTTPError as error:
            raise _unreachable(error) from error
        return _content(answer)


def follow(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The server-sent events of a path, as (type, data); taken up again where it broke off."""
    import httpx

    last_id = ""
    patience = Patience()
    while True:
        headers = {"Last-Event-ID": last_id} if last_id else {}
        with _client() as client:
            try:
                with client.stream("GET", path, params={"follow": "1"}, headers=headers) as answer:
                    if answer.is_error:
                        answer.read()
                        _content(answer)
                    patience.answered()
                    for event_id, kind, data in _events(answer.iter_lines()):
                        last_id = event_id
                        yield kind, data
                    return
            except httpx.RemoteProtocolError:
                continue  # the gateway was replaced while we listened
            except httpx.HTTPError as error:
                patience.wait(_unreachable(error))
            except Later as error:
                patience.wait(error)


def stream(path: str, body: Any) -> Iterator[dict[str, Any]]:
    """What the server answers to a POST bit by bit, until it says [DONE]."""
    import httpx

    with _client() as client:
        try:
            # A model may have to be loaded first, and may think for as long as it likes.
            with client.stream("POST", path, json=body, timeout=httpx.Timeout(CONNECT_SECONDS, read=None)) as answer:
                if answer.is_error:
                    answer.read()
                    _content(answer)
                for line in answer.iter_lines():
                    data = line.removeprefix("data: ")
                    if data == "[DONE]":
                        return
                    if data:
                        yield json.loads(data)
        except httpx.HTTPError as error:
            raise _unreachable(error) from error


def server_url() -> str:
    from cluster.runtime import run_state

    return os.environ.get("FORGEARR_URL") or run_state.current_url()


def _client() -> Any:
    import httpx

    key = os.environ.get("FORGEARR_API_KEY")
    timeout = httpx.Timeout(PATIENCE_SECONDS, connect=CONNECT_SECONDS)
    return httpx.Client(base_url=server_url(), timeout=timeout, headers={"X-API-Key": key} if key else {})


def _content(answer: Any) -> Any:
    if answer.is_success:
        return answer.json() if answer.content else None
    try:
        told = answer.json()
        message = told["message"] if "message" in told else told["detail"]  # the second under /v1
    except (ValueError, KeyError, TypeError):
        message = f"{answer.request.url} answered {answer.status_code}."
    if answer.status_code == 401 and "FORGEARR_API_KEY" not in os.environ:
        message += " Set FORGEARR_API_KEY to a key of yours."
    if answer.status_code in {429, 503}:
        raise Later(message, _retry_after(answer))
    raise Refused(message)


def _retry_after(answer: Any) -> float:
    try:
        return max(1.0, float(answer.headers["Retry-After"]))
    except (KeyError, ValueError):
        return RETRY_SECONDS


def _events(lines: Iterator[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    fields: dict[str, str] = {}
    for line in lines:
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
        elif not line and "data" in fields:
            yield fields.get("id", ""), fields.get("event", "message"), json.loads(fields["data"])
            fields = {}


def _unreachable(error: Exception) -> Unreachable:
    return Unreachable(f"Nothing answers at {server_url()} ({type(error).__name__}); `forgearr up` starts the server.")
