"""Marks of routes: who may call a route, and which limits apply to it.

    @router.post("/audit")
    @rate_limit("audit")
    async def audit_configuration(body: AuditRequest, caller: AdminCaller) -> AuditView: ...

Most routes need no mark: the type of their caller says who may call them. What is the same for all routes of a router
is in serve/routes.py.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, APIWebSocketRoute

Access = Literal["public", "signed", "registration", "user", "admin"]
"""`public` checks no credential. `signed` checks a signature instead. `registration` is public or for administrators,
depending on `auth.registration`."""
RateLimit = Literal["general", "health", "content", "audit", "apply", "recommendations"]
"""A setting of `limits`. Requests to all routes with the same mark are counted together."""
Route = APIRoute | APIWebSocketRoute
Function = TypeVar("Function", bound=Callable[..., Any])

_access: dict[object, Access] = {}
_rate_limits: dict[object, RateLimit] = {}
_streaming: set[object] = set()


def access(value: Access) -> Callable[[Function], Function]:
    """Mark a route without a caller, or a dependency that returns the caller."""
    return _marker(_access, value)


def rate_limit(value: RateLimit) -> Callable[[Function], Function]:
    """Mark a route that has a rate limit of its own."""
    return _marker(_rate_limits, value)


def streams_body(function: Function) -> Function:
    """Mark a route that reads its body as a stream, and limits and validates it itself."""
    _streaming.add(function)
    return function


def access_of(route: Route) -> Access | None:
    """The mark of the route, or the strictest mark of its dependencies. None without any."""
    marks = {_access[call] for call in _calls(route.dependant) if call in _access}
    if own := _access.get(route.endpoint):
        return own
    return "admin" if "admin" in marks else "user" if "user" in marks else None


def rate_limit_of(route: Route) -> RateLimit:
    return _rate_limits.get(route.endpoint, "general")


def has_streamed_body(route: Route) -> bool:
    return route.endpoint in _streaming


def _marker(marks: dict[object, Any], value: str) -> Callable[[Function], Function]:
    def mark(function: Function) -> Function:
        marks[function] = value
        return function

    return mark


def _calls(dependant: Dependant) -> Iterator[object]:
    for dependency in dependant.dependencies:
        yield dependency.call
        yield from _calls(dependency)
