"""Fixtures of the guardian's tests."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def record_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Return a function that lists the command lines of all git processes since, from git's own trace."""
    trace = tmp_path / "trace"
    monkeypatch.setenv("GIT_TRACE", str(trace))
    return lambda: trace.read_text().splitlines()
