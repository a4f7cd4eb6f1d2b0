"""Logs: their format, their context, and the redaction of secrets."""

from cluster.logs.context import job_id, request_id
from cluster.logs.reader import BLOCK_BYTES, FOLLOW_SECONDS, LEVELS, Line, follow, recent, wanted
from cluster.logs.redaction import MASK, SECRET_NAME, only_hosts, redact
from cluster.logs.setup import CHATTY, configure, folder, rotate

__all__ = [
    "BLOCK_BYTES",
    "CHATTY",
    "FOLLOW_SECONDS",
    "LEVELS",
    "MASK",
    "SECRET_NAME",
    "Line",
    "configure",
    "folder",
    "follow",
    "job_id",
    "only_hosts",
    "recent",
    "redact",
    "request_id",
    "rotate",
    "wanted",
]
