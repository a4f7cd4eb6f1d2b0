"""The base classes of all errors that Forgearr raises on purpose.

ForgearrError                500  internal_error
├── InvalidRequest           400  invalid_request
│   └── SettingsError             a setting that prevents the start
├── Unauthenticated          401  unauthorized
├── Forbidden                403  forbidden
│   ├── AccountDisabled
│   └── CrossOrigin
├── NotFound                 404  not_found
├── Conflict                 409  conflict
├── UnprocessableRequest     422  invalid_request
├── RateLimitExceeded        429  rate_limit_exceeded
└── Unavailable              503  service_unavailable

A class has the HTTP status, the codes and the default message (its docstring), so a route only renders what it
catches. `error` is the general code, `code` the exact one. A subclass stands beside the code that raises it, and names
what is concerned: `class JobNotFound(NotFound): code = "JOB_NOT_FOUND"`.
"""

from collections.abc import Mapping


class ForgearrError(Exception):
    """An internal error occurred; the log has the details."""

    status = 500
    error = "internal_error"
    code = "INTERNAL_ERROR"
    retryable = False
    """Whether a job that fails with this error may succeed in another attempt."""
    retry_after: int | None = None
    """Seconds after which a client may repeat the request, if they are known."""

    def __init__(self, message: str | None = None, *, details: Mapping[str, object] | None = None) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.details = dict(details or {})
        super().__init__(self.message)


class InvalidRequest(ForgearrError):
    """The request is not valid."""

    status = 400
    error = "invalid_request"
    code = "INVALID_REQUEST"


class SettingsError(InvalidRequest):
    """A setting is not valid."""

    code = "INVALID_SETTING"


class Unauthenticated(ForgearrError):
    """A valid credential is required: send X-API-Key, or Authorization: Bearer with an API key or access token."""

    status = 401
    error = "unauthorized"
    code = "UNAUTHORIZED"


class Forbidden(ForgearrError):
    """Your account may not do this."""

    status = 403
    error = "forbidden"
    code = "FORBIDDEN"


class AccountDisabled(Forbidden):
    """This account is disabled; an administrator can enable it again."""

    code = "ACCOUNT_DISABLED"


class CrossOrigin(Forbidden):
    """This server needs no credential on this machine, so it refuses requests from web pages of other origins."""

    code = "CROSS_ORIGIN"


class NotFound(ForgearrError):
    """There is nothing with this name."""

    status = 404
    error = "not_found"
    code = "NOT_FOUND"


class Conflict(ForgearrError):
    """The request conflicts with the current state."""

    status = 409
    error = "conflict"
    code = "CONFLICT"


class UnprocessableRequest(ForgearrError):
    """A field of the request is not valid."""

    status = 422
    error = "invalid_request"
    code = "VALIDATION_ERROR"


class RateLimitExceeded(ForgearrError):
    """Rate limit exceeded."""

    status = 429
    error = "rate_limit_exceeded"
    code = "RATE_LIMIT_EXCEEDED"

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"Rate limit exceeded. Try again in {retry_after} seconds.")
        self.retry_after = retry_after


class Unavailable(ForgearrError):
    """A required part of Forgearr is not reachable; try again in a moment."""

    status = 503
    error = "service_unavailable"
    code = "SERVICE_UNAVAILABLE"
    retryable = True
