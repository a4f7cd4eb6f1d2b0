"""Set up logging: JSON lines in FORGEARR_HOME/logs/<component>.jsonl, text on a terminal, secrets masked in both.

All processes of a component append to the same file, one write per line. The supervisor rotates a large file, and each
writer reopens it. The output of other programs (ray.log, mlflow.log) is rotated too. The ids of the request and the job
come from context variables.
"""

import json
import logging
import logging.handlers
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from cluster.logs.context import job_id, request_id
from cluster.logs.redaction import redact
from cluster.settings import get_settings, home

# Libraries that log every operation at INFO.
NOISY_LOGGERS = (
    "aiosqlite",
    "alembic",
    "asyncio",
    "botocore",
    "filelock",
    "httpcore",
    "httpx",
    "sqlalchemy",
    "urllib3",
)


def configure(component: str, *, console: bool = False) -> None:
    """Write the log of this process to its component's file, and with `console` also to the terminal."""
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
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)


def folder() -> Path:
    path = home() / "logs"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def rotate() -> None:
    """Rotate each file that is larger than logs.rotate_mb. One older file of each component remains."""
    limit = get_settings().logs.rotate_mb * 1_000_000
    for path in folder().glob("*.jsonl"):
        if path.stat().st_size > limit:
            path.replace(path.with_suffix(".jsonl.1"))
    for path in folder().glob("*.log"):
        if path.stat().st_size > limit:
            # Programs keep their output open and append to it, so it is copied and emptied.
            shutil.copyfile(path, path.with_suffix(".log.1"))
            os.truncate(path, 0)


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
