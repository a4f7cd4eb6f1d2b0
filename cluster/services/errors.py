"""The errors of calls to outside services.

ServiceError                503
├── Unreachable                  no response, or not in time
├── CircuitOpen                  it has failed too often, and is not called for a while
├── Unauthorized                 it does not accept the key
├── BadResponse                  its response is not valid
├── WrongService                 another program answers at its address
├── NotFoundInService       404  it does not have the object
└── Refused                 400  it refuses the request

`http/client.py` translates all errors of HTTP and of the network to these; no other code sees the original ones.
"""

from cluster.errors import ForgearrError


class ServiceError(ForgearrError):
    """The service cannot be used now."""

    status = 503
    error = "service_unavailable"
    code = "SERVICE_UNAVAILABLE"
    is_failure = True
    """Whether the circuit breaker counts this as a failure. It does not count a refusal: the service works."""


class Unreachable(ServiceError):
    """The service does not answer."""

    code = "SERVICE_UNREACHABLE"
    retryable = True


class CircuitOpen(ServiceError):
    """The service has failed too often, and is not called for a while."""

    code = "SERVICE_CIRCUIT_OPEN"
    retryable = True

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unauthorized(ServiceError):
    """The service does not accept the API key."""

    code = "SERVICE_UNAUTHORIZED"


class BadResponse(ServiceError):
    """The response of the service is not valid."""

    code = "SERVICE_BAD_RESPONSE"
    retryable = True


class WrongService(ServiceError):
    """Another program answers at the address of the service."""

    code = "WRONG_SERVICE"


class NotFoundInService(ServiceError):
    """The service does not have this."""

    status = 404
    error = "not_found"
    code = "NOT_IN_SERVICE"
    is_failure = False


class Refused(ServiceError):
    """The service refuses the request."""

    status = 400
    error = "invalid_request"
    code = "REFUSED_BY_SERVICE"
    is_failure = False


class ErrorInResponse(Exception):
    """For connectors: a well-formed response that reports an error. The client raises one of the errors above."""

    def __init__(self, message: str, *, is_key_error: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.is_key_error = is_key_error
