"""A command that watches a job waits out a server that limits it, or is being replaced."""

from typing import Any

import pytest

from cluster.cli import client
from cluster.cli.client import RequestRefused, RetryLater, RetryPolicy, ServerUnreachable, poll

GONE = ServerUnreachable("Nothing answers.")


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited, on a clock that waiting alone moves."""
    slept: list[float] = []
    monkeypatch.setattr("time.monotonic", lambda: sum(slept))
    monkeypatch.setattr("time.sleep", slept.append)
    return slept


def answering(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> None:
    told = list(answers)

    def call(method: str, path: str) -> Any:
        answer = told.pop(0) if len(told) > 1 else told[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(client, "call", call)


def test_a_limit_and_a_replaced_gateway_are_waited_out(
    monkeypatch: pytest.MonkeyPatch, slept: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    answering(monkeypatch, "first", RetryLater("Too many requests.", 40), GONE, RetryLater("Not now.", 2), "second")
    patience = RetryPolicy()
    assert [poll("/status/job", patience) for _ in range(2)] == ["first", "second"]
    assert slept == [40, client.RETRY_SECONDS, 2]
    assert capsys.readouterr().err == f"Too many requests. Trying again for {client.MAX_WAIT_SECONDS} s …\n"


def test_patience_ends(monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    answering(monkeypatch, "first", GONE)
    patience = RetryPolicy()
    poll("/status/job", patience)
    with pytest.raises(ServerUnreachable):
        poll("/status/job", patience)
    assert sum(slept) == pytest.approx(client.MAX_WAIT_SECONDS, abs=client.RETRY_SECONDS)


@pytest.mark.parametrize("error", [GONE, RequestRefused("There is no such job.")])
def test_what_no_waiting_helps_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, slept: list[float], error: Exception
) -> None:
    answering(monkeypatch, error)
    with pytest.raises(type(error)):
        poll("/status/job", RetryPolicy())
    assert slept == []
