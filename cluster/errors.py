"""Every error that Forgearr raises on purpose.

ForgearrError                500  internal_error
├── InvalidRequest           400  invalid_request
│   └── SettingsError             a setting that stops the start
├── Unauthenticated          401  unauthorized
├── Forbidden                403  forbidden
│   ├── AccountDisabled
│   └── CrossOrigin
├── NotFound                 404  not_found
├── Conflict                 409  conflict
├── UnprocessableRequest     422  invalid_request
├── RateLimitExceeded        429  rate_limit_exceeded
└── Unavailable              503  service_unavailable

The status, the codes and the default sentence (the docstring) live on the class, so that a door only has to render
what it catches. `error` is the word that clients branch on, `code` the same in the gateway's dialect; a subclass names
the thing concerned (`class JobNotFound(NotFound): code = "JOB_NOT_FOUND"`) beside the code that raises it.
"""

from collections.abc import Mapping


class ForgearrError(Exception):
    """Something went wrong inside Forgearr; its log says what."""

    status = 500
    error = "internal_error"
    code = "INTERNAL_ERROR"
    retryable = False
    """Whether a job that meets this error may succeed if it is tried again later."""
    retry_after: int | None = None
    """Seconds after which a client may ask again, where that can be said."""

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
    """This server needs no credential on this machine, so it answers no web page of another origin."""

    code = "CROSS_ORIGIN"


class NotFound(ForgearrError):
    """There is nothing here by that name."""

    status = 404
    error = "not_found"
    code = "NOT_FOUND"


class Conflict(ForgearrError):
    """The request does not fit the present state."""

    status = 409
    error = "conflict"
    code = "CONFLICT"


class UnprocessableRequest(ForgearrError):
    """The request has a field that is not valid."""

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
    """A part of Forgearr that this needs is not reachable right now; try again in a moment."""

    status = 503
    error = "service_unavailable"
    code = "SERVICE_UNAVAILABLE"
    retryable = True
