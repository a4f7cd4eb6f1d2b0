"""Logging to files that processes share, masking of secrets, and reading of several files in order."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster import logs
from cluster.cli import app
from cluster.settings import get_settings
from tests.support.waiting import TIMEOUT, eventually

log = logging.getLogger("tests.logs")

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhZGEifQ.c2lnbmF0dXJl"
PROGRAM = """
import sys
while (line := sys.stdin.readline()) == "\\n":
    sys.stdout.write("x" * 1_000_001)
    sys.stdout.flush()
sys.stdout.write(line.strip())
"""
WRITER = """
import logging, sys
from cluster import logs
logs.configure("shared")
for number in range(200):
    logging.getLogger("writer").info("%s", sys.argv[1] * 20_000)
"""


@pytest.fixture(autouse=True)
def restored_logging(home: Path) -> Iterator[None]:
    """Restore pytest's logging, because each test configures logging for the whole process."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    noisy_levels = {name: logging.getLogger(name).level for name in logs.NOISY_LOGGERS}
    root.handlers[:] = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, previous in noisy_levels.items():
        logging.getLogger(name).setLevel(previous)
    logging.captureWarnings(False)


def lines(component: str = "test") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (logs.folder() / f"{component}.jsonl").read_text().splitlines()]


def test_a_line_has_time_component_request_and_job() -> None:
    logs.configure("test")
    request = logs.request_id.set("req-1")
    job = logs.job_id.set("job_1")
    log.warning("disk at %d %%", 91)
    logs.request_id.reset(request)
    logs.job_id.reset(job)
    log.info("later")

    first, second = lines()
    assert first["timestamp"].endswith("Z")
    del first["timestamp"]
    assert first == {
        "level": "WARNING",
        "component": "test",
        "logger": "tests.logs",
        "message": "disk at 91 %",
        "request_id": "req-1",
        "job_id": "job_1",
        "exception": None,
    }
    assert (second["request_id"], second["job_id"]) == (None, None)


def test_the_level_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_LOGS__LEVEL", "WARNING")
    logs.configure("test")
    log.info("not this")
    log.warning("but this")
    assert [line["message"] for line in lines()] == ["but this"]


def test_configuring_again_does_not_write_twice() -> None:
    logs.configure("test")
    logs.configure("test")
    log.info("once")
    assert len(lines()) == 1


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("Authorization: Bearer abcdef123456", "abcdef123456"),
        ("authorization: Basic YWRhOmh1bnRlcjI=", "YWRhOmh1bnRlcjI="),
        ("{'Authorization': 'Bearer abcdef123456', 'Accept': '*/*'}", "abcdef123456"),
        ("[(b'authorization', b'Bearer abcdef123456'), (b'host', b'x')]", "abcdef123456"),
        ("X-API-Key: 0123456789abcdef", "0123456789abcdef"),
        ("[(b'x-api-key', b'0123456789abcdef')]", "0123456789abcdef"),
        ("GET /api/v3/series?apikey=0123456789abcdef&page=2", "0123456789abcdef"),
        ("key fgr_Zm9yZ2VhcnItaXMtYS1zZWNyZXQ was used", "Zm9yZ2VhcnItaXMtYS1zZWNyZXQ"),
        ("token refresh_Zm9yZ2VhcnItaXMtYS1zZWNyZXQ", "Zm9yZ2VhcnItaXMtYS1zZWNyZXQ"),
        (f"sent {JWT} to the server", JWT),
        ("password=hunter22 for ada", "hunter22"),
        ('{"email": "ada@example.com", "password": "hunter 22; yes"}', "hunter 22; yes"),
        ("{'plex_token': 'abc'}", "'abc'"),
        ("client_secret: abc123", "abc123"),
        ("postgresql://ada:hunter22@db.lan/forge", "hunter22"),
        ("https://ghp_0123456789@github.com/ada/forge.git", "ghp_0123456789"),
    ],
)
def test_secrets_are_masked(text: str, secret: str) -> None:
    assert secret in text
    assert secret not in logs.redact(text)
    assert logs.MASK in logs.redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=128, prompt_tokens: 7",
        "the tokenizer has 512 tokens",
        "http://127.0.0.1:8000/health answered 200",
        "ada@example.com has logged in",
        "git@github.com:ada/forge.git was cloned",
        "the password of ada has changed",
    ],
)
def test_harmless_text_is_not_masked(text: str) -> None:
    assert logs.redact(text) == text


def test_secrets_in_arguments_and_in_exceptions_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    logs.configure("test", console=True)
    try:
        raise ValueError("cannot log in with password=hunter22")
    except ValueError:
        log.exception("headers: %s", {"X-API-Key": "hunter22"})
    line = lines()[0]
    assert "ValueError" in line["exception"]
    assert "ValueError" in terminal.getvalue()
    assert "hunter22" not in json.dumps(line) + terminal.getvalue()


def test_processes_that_share_a_file_do_not_mix_their_lines(home: Path) -> None:
    get_settings()
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, letter]) for letter in "abc"]
    assert [writer.wait(TIMEOUT) for writer in writers] == [0, 0, 0]
    messages = [line["message"] for line in lines("shared")]
    assert sorted(messages) == sorted(letter * 20_000 for letter in "abc" for _ in range(200))


def test_a_large_file_is_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_LOGS__ROTATE_MB", "1")
    logs.configure("test")
    log.info("x" * 1_000_001)
    logs.rotate()
    log.info("fresh")
    assert [line["message"] for line in lines()] == ["fresh"]
    assert (logs.folder() / "test.jsonl.1").stat().st_size > 1_000_000
    assert logs.folder().stat().st_mode & 0o077 == 0


def test_the_output_of_a_program_that_keeps_running_is_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_LOGS__ROTATE_MB", "1")
    get_settings.cache_clear()
    path = logs.folder() / "mlflow.log"
    with path.open("ab") as output:
        program = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=output)
        assert program.stdin is not None
        for _ in range(2):
            program.stdin.write(b"\n")
            program.stdin.flush()
            eventually(lambda: path.stat().st_size == 1_000_001)
            logs.rotate()
            assert path.stat().st_size == 0
        program.communicate(b"end\n", TIMEOUT)
    assert path.read_text() == "end"
    assert (logs.folder() / "mlflow.log.1").read_text() == "x" * 1_000_001
    assert len(list(logs.folder().iterdir())) == 2


def write(component: str, *entries: tuple[str, str, str]) -> None:
    content = [
        {"timestamp": f"2026-01-01T00:00:{second}Z", "level": level, "component": component, "message": message}
        for second, level, message in entries
    ]
    with (logs.folder() / f"{component}.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in content)


def test_the_lines_of_all_components_are_read_in_order() -> None:
    write("gateway", ("01", "INFO", "one"), ("03", "ERROR", "three"))
    write("worker", ("02", "DEBUG", "two"), ("04", "INFO", "four"))
    with (logs.folder() / "worker.jsonl").open("a") as file:
        file.write('{"timestamp": "half a li')

    def read(count: int, component: str | None = None, level: str | None = None) -> list[str]:
        return [line["message"] for line in logs.recent(count, logs.line_filter(component, level))]

    assert read(10) == ["one", "two", "three", "four"]
    assert read(2) == ["three", "four"]
    assert read(10, component="worker") == ["two", "four"]
    assert read(10, level="INFO") == ["one", "three", "four"]


def test_lines_longer_than_a_block_are_read_completely() -> None:
    long = "y" * (2 * logs.BLOCK_BYTES + 17)
    write("gateway", ("01", "INFO", "short"), ("02", "INFO", long), ("03", "INFO", "end"))
    recent = logs.recent(3, logs.line_filter(None, None))
    assert [line["message"] for line in recent] == ["short", long, "end"]


def test_new_lines_are_followed_through_a_rotation() -> None:
    write("gateway", ("01", "INFO", "old"))
    followed = logs.follow(logs.line_filter(None, None))
    write("gateway", ("02", "INFO", "second"))
    assert next(followed)["message"] == "second"
    path = logs.folder() / "gateway.jsonl"
    path.replace(path.with_suffix(".jsonl.1"))
    write("gateway", ("03", "INFO", "third"))
    assert next(followed)["message"] == "third"


def test_the_logs_command_prints_lines() -> None:
    write("gateway", ("01", "INFO", "one"), ("02", "ERROR", "two [bold]"))
    result = CliRunner().invoke(app, ["logs", "--level", "error"])
    assert result.exit_code == 0
    assert result.output == "2026-01-01 00:00:02Z ERROR   gateway    two [bold]\n"
    assert CliRunner().invoke(app, ["logs", "--level", "loud"]).exit_code == 2
