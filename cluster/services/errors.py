"""What becomes of whatever goes wrong between Forgearr and a service.

ServiceError                503
├── Unreachable                  nobody answers, or not in time
├── CircuitOpen                  it has failed too often, and is left alone for a while
├── Unauthorised                 it does not take our key
├── BadResponse                  it answers, but not with what we understand
├── WrongService                 something else answers at its address
├── NotThere                404  it has no such thing
└── Refused                 400  it will not do this

`client.py` translates once; nobody else sees an error of HTTP or of the network.
"""

from cluster.errors import ForgearrError


class ServiceError(ForgearrError):
    """The service cannot be used right now."""

    status = 503
    error = "service_unavailable"
    code = "SERVICE_UNAVAILABLE"
    is_failure = True
    """Whether the service has failed, or has only said no: the circuit breaker counts failures."""


class Unreachable(ServiceError):
    """The service does not answer."""

    code = "SERVICE_UNREACHABLE"
    retryable = True


class CircuitOpen(ServiceError):
    """The service has failed too often, and is not asked for a while."""

    code = "SERVICE_CIRCUIT_OPEN"
    retryable = True

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unauthorized(ServiceError):
    """The service does not take the API key."""

    code = "SERVICE_UNAUTHORIZED"


class BadResponse(ServiceError):
    """The service answers with something that cannot be understood."""

    code = "SERVICE_BAD_RESPONSE"
    retryable = True


class WrongService(ServiceError):
    """Something else answers at the address of the service."""

    code = "WRONG_SERVICE"


class NotFoundInService(ServiceError):
    """The service has no such thing."""

    status = 404
    error = "not_found"
    code = "NOT_IN_SERVICE"
    is_failure = False


class Refused(ServiceError):
    """The service refuses this."""

    status = 400
    error = "invalid_request"
    code = "REFUSED_BY_SERVICE"
    is_failure = False


class ErrorInResponse(Exception):
    """For connectors: a well-formed answer that tells of an error. The client says it as one of the errors above."""

    def __init__(self, message: str, *, is_key_error: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.is_key_error = is_key_error
