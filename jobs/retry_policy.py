"""Which errors are worth another attempt, and how long to wait before it."""

import random
from dataclasses import dataclass

from cluster.errors import ForgearrError
from cluster.settings import get_settings


@dataclass(frozen=True)
class Failure:
    """An attempt that ended in an error."""

    code: str
    message: str
    retry_in: float | None = None
    """Seconds until the next attempt; None when another attempt would only fail the same way."""

    def to_error(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message}


# The same input makes the same mistake again.
PERMANENT_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    SyntaxError,
)


def classify_error(error: BaseException, attempt: int) -> Failure:
    """What an exception that a job's function raised means for the job."""
    if isinstance(error, ForgearrError):
        wait = backoff(attempt) if error.retryable else None
        return Failure(error.code.lower(), error.message, wait)
    message = f"{type(error).__name__}: {_error_text(error)}".removesuffix(": ")
    if isinstance(error, PERMANENT_ERRORS):
        return Failure("job_error", message)
    if isinstance(error, MemoryError):
        return Failure("out_of_memory", message, get_settings().jobs.retry_cap_seconds)
    return Failure("job_error", message, backoff(attempt))


def _error_text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # it is the job's own class, and may be as broken as the job
        return "(it cannot say what it is)"


def backoff(attempt: int) -> float:
    """Doubling waits, each shortened at random by up to a quarter: what failed together should not return together."""
    settings = get_settings().jobs
    wait = min(settings.retry_seconds * 2 ** (attempt - 1), settings.retry_cap_seconds)
    return wait * random.uniform(0.75, 1)  # noqa: S311
