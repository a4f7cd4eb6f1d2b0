"""The retry policy: which errors are worth another attempt, and the delay before it."""

import random
from dataclasses import dataclass

from cluster import logs
from cluster.errors import ForgearrError
from cluster.settings import get_settings


@dataclass(frozen=True)
class Failure:
    """An attempt that ended in an error."""

    code: str
    message: str
    retry_in: float | None = None
    """Seconds until the next attempt. None: another attempt would fail in the same way."""

    def to_error(self) -> dict[str, str]:
        """Return what is stored, shown and sent to MLflow. The text of an exception may have a secret in it."""
        return {"code": self.code, "message": logs.redact(self.message)}


# Errors that occur again with the same input.
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
    """Decide what an exception that a job's function raised means for the job."""
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
    except Exception:  # the class may be the job's own, with a broken __str__
        return "(its text cannot be read)"


def backoff(attempt: int) -> float:
    """Return the delay before the next attempt. It doubles with each one.

    It is shortened at random by up to a quarter, so that jobs that failed together do not return together.
    """
    settings = get_settings().jobs
    wait = min(settings.retry_seconds * 2 ** (attempt - 1), settings.retry_cap_seconds)
    return wait * random.uniform(0.75, 1)  # noqa: S311
