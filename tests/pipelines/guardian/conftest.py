"""What tests of the guardian share."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def record_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Tells the command line of every git that has run since, as git itself traces it."""
    trace = tmp_path / "trace"
    monkeypatch.setenv("GIT_TRACE", str(trace))
    return lambda: trace.read_text().splitlines()
