"""Polling of the command line during rate limits and while the gateway is replaced."""

from typing import Any

import pytest

from cluster.cli import client
from cluster.cli.client import RequestRefused, RetryLater, RetryPolicy, ServerUnreachable, poll

UNREACHABLE = ServerUnreachable("Nothing answers.")


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The durations of all sleeps, on a clock that only sleeping moves."""
    sleeps: list[float] = []
    monkeypatch.setattr("time.monotonic", lambda: sum(sleeps))
    monkeypatch.setattr("time.sleep", sleeps.append)
    return sleeps


def stub_responses(monkeypatch: pytest.MonkeyPatch, *responses: Any) -> None:
    remaining = list(responses)

    def call(method: str, path: str) -> Any:
        response = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        if isinstance(response, Exception):
            raise response
        return response

    monkeypatch.setattr(client, "call", call)


def test_polling_waits_for_rate_limits_and_a_replaced_gateway(
    monkeypatch: pytest.MonkeyPatch, sleeps: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    stub_responses(
        monkeypatch, "first", RetryLater("Too many requests.", 40), UNREACHABLE, RetryLater("Not now.", 2), "second"
    )
    policy = RetryPolicy()
    assert [poll("/status/job", policy) for _ in range(2)] == ["first", "second"]
    assert sleeps == [40, client.RETRY_SECONDS, 2]
    assert capsys.readouterr().err == f"Too many requests. Trying again for {client.MAX_WAIT_SECONDS} s …\n"


def test_polling_gives_up_after_the_longest_wait(monkeypatch: pytest.MonkeyPatch, sleeps: list[float]) -> None:
    stub_responses(monkeypatch, "first", UNREACHABLE)
    policy = RetryPolicy()
    poll("/status/job", policy)
    with pytest.raises(ServerUnreachable):
        poll("/status/job", policy)
    assert sum(sleeps) == pytest.approx(client.MAX_WAIT_SECONDS, abs=client.RETRY_SECONDS)


@pytest.mark.parametrize("error", [UNREACHABLE, RequestRefused("There is no such job.")])
def test_a_permanent_error_is_raised_at_once(
    monkeypatch: pytest.MonkeyPatch, sleeps: list[float], error: Exception
) -> None:
    stub_responses(monkeypatch, error)
    with pytest.raises(type(error)):
        poll("/status/job", RetryPolicy())
    assert sleeps == []
