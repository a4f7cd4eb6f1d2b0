"""Logging: JSON lines in FORGEARR_HOME/logs/<component>.jsonl, readable lines on a terminal, no secret in either.

Several processes of one component append to the same file, one write per line; the supervisor sets a file aside when
it grows too big, and each writer notices that by itself. Which request and which job a line belongs to is taken from
the context in which it is written.
"""

import json
import logging
import logging.handlers
import re
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path

from cluster.settings import get_settings, home

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
job_id: ContextVar[str | None] = ContextVar("job_id", default=None)

MASK = "********"
# Libraries that tell of each thing they do at INFO.
CHATTY = ("aiosqlite", "alembic", "asyncio", "botocore", "filelock", "httpcore", "httpx", "sqlalchemy", "urllib3")

_WORDS = r"password|passwd|secret|token(?!s|iz)|api[-_]?key|signing[-_]?key|authorization|cookie"
SECRET_NAME = re.compile(_WORDS, re.IGNORECASE)
"""What is in the name of something that is secret."""
_NAMES = rf"\b[\w.-]{{0,40}}(?:{_WORDS})[\w.-]{{0,40}}"
_SECRETS = (
    # https://token@host and scheme://user:password@host
    (re.compile(r"(\bhttps?://)[^\s/@'\"]+@", re.IGNORECASE), rf"\1{MASK}@"),
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@'\"]*):[^\s/'\"]+@", re.IGNORECASE), rf"\1:{MASK}@"),
    # name="value", {'name': 'value'}, (b'name', b'value'): between quotes a value may hold anything
    (re.compile(rf"({_NAMES}[\"']?\s*[:=,]\s*b?)([\"'])(?:(?!\2).)*\2", re.IGNORECASE), rf"\1\2{MASK}\2"),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{4,}", re.IGNORECASE), rf"\1 {MASK}"),
    # name: value, name=value
    (re.compile(rf"({_NAMES}[\"']?\s*[:=]\s*)(?!Bearer|Basic|b?[\"'])[^\s&,;\"'}})\]]+", re.IGNORECASE), rf"\1{MASK}"),
    # our own credentials, and any JWT, wherever they turn up
    (re.compile(r"\b(fgr|refresh)_[\w-]{16,}"), rf"\1_{MASK}"),
    (re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]*"), MASK),
)
_LINK = re.compile(r"(https?://)(?:[^\s/@]*@)?([^\s/?#&]+)[/?#&]\S*", re.IGNORECASE)


def configure(component: str, *, console: bool = False) -> None:
    """Send this process's logging to its component's file, and with `console` to the terminal as well."""
    settings = get_settings().logs
    handlers: list[logging.Handler] = [_file_handler(component)]
    if console:
        handlers.append(_console_handler(component))
    root = logging.getLogger()
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(settings.level)
    for name in CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)


def folder() -> Path:
    path = home() / "logs"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def rotate() -> None:
    """Set aside each file that has grown too big; one older file of each is kept."""
    limit = get_settings().logs.rotate_mb * 1_000_000
    for path in folder().glob("*.jsonl"):
        if path.stat().st_size > limit:
            path.replace(path.with_suffix(".jsonl.1"))


def redact(text: str) -> str:
    """The text with every secret in it masked."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def only_hosts(text: str) -> str:
    """The text with nothing left of addresses but whose they are: of a link, any part may be a key."""
    return _LINK.sub(r"\1\2/…", text)


def _file_handler(component: str) -> logging.Handler:
    handler = logging.handlers.WatchedFileHandler(folder() / f"{component}.jsonl", encoding="utf-8")
    handler.setFormatter(_JsonFormatter(component))
    return handler


def _console_handler(component: str) -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(_ConsoleFormatter(component))
    return handler


class _JsonFormatter(logging.Formatter):
    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "timestamp": _utc(record).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "component": self._component,
            "logger": record.name,
            "message": redact(record.getMessage()),
            "request_id": request_id.get(),
            "job_id": job_id.get(),
            "exception": redact(self.formatException(record.exc_info)) if record.exc_info else None,
        }
        return json.dumps(line, ensure_ascii=False)


class _ConsoleFormatter(logging.Formatter):
    def __init__(self, component: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)-7s {component}: %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _utc(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)
