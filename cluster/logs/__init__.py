"""Logs: their format, their context, and the redaction of secrets."""

from cluster.logs.context import job_id, request_address, request_id
from cluster.logs.reader import BLOCK_BYTES, LEVELS, POLL_SECONDS, Line, follow, line_filter, recent
from cluster.logs.redaction import MASK, SECRET_NAME, redact, redact_document, strip_url_paths
from cluster.logs.setup import NOISY_LOGGERS, configure, folder, rotate

__all__ = [
    "BLOCK_BYTES",
    "LEVELS",
    "MASK",
    "NOISY_LOGGERS",
    "POLL_SECONDS",
    "SECRET_NAME",
    "Line",
    "configure",
    "folder",
    "follow",
    "job_id",
    "line_filter",
    "recent",
    "redact",
    "redact_document",
    "request_address",
    "request_id",
    "rotate",
    "strip_url_paths",
]
