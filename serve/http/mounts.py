"""Adds routers to the application, and finds the marks of a route before the request is routed."""

import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.routing import APIRoute, APIWebSocketRoute
from starlette.types import Scope

from serve.http.errors import ERROR_RESPONSES, Envelope
from serve.http.json_body import CheckedRequest, refuse_many_mistakes
from serve.http.marks import Access, RateLimit, Route, access_of, has_streamed_body, rate_limit_of

MARKS_SCOPE_KEY = "forgearr.marks"
WEBSOCKET = "WEBSOCKET"


class IncompleteMarks(TypeError):
    """The marks of a route are incomplete."""


@dataclass(frozen=True)
class Mount:
    """A router, and what is the same for all its routes."""

    router: APIRouter
    tag: str
    envelope: Envelope = "native"

    @property
    def routes(self) -> Iterator[Route]:
        for route in self.router.routes:
            if not isinstance(route, APIRoute | APIWebSocketRoute):
                raise IncompleteMarks(f"{route!r} is not a route: add its router to the table of routers itself.")
            yield route


@dataclass(frozen=True, slots=True)
class Marks:
    """All marks of a route. The defaults are for requests that match no route."""

    envelope: Envelope
    access: Access | None = None
    rate_limit: RateLimit = "general"
    streams_body: bool = False


@dataclass(frozen=True, slots=True)
class _MarkedRoute:
    pattern: re.Pattern[str]
    methods: frozenset[str]
    marks: Marks


class RouteIndex:
    """Finds the marks of a route by method and path, without a scan of all routes."""

    def __init__(self, mounts: Iterable[Mount]) -> None:
        self._routes: dict[str, list[_MarkedRoute]] = defaultdict(list)
        """By the part of the path before the first parameter."""
        self._envelopes: dict[str, set[Envelope]] = defaultdict(set)
        """By the first segment of the path."""
        for mount in mounts:
            for route in mount.routes:
                methods = frozenset(methods_of(route))
                beginning = route.path.partition("{")[0]
                self._routes[beginning].append(_MarkedRoute(route.path_regex, methods, marks_of_route(mount, route)))
                self._envelopes[_first_segment(route.path)].add(mount.envelope)
        self._depth = max((beginning.count("/") for beginning in self._routes), default=0)

    def find(self, method: str, path: str) -> Marks:
        # Starlette's patterns end in $, which also matches before a line break at the end.
        path = path.removesuffix("\n")
        same_path: Marks | None = None
        for beginning in _beginnings(path, self._depth):
            for route in self._routes.get(beginning, ()):
                if route.pattern.match(path):
                    if method in route.methods:
                        return route.marks
                    same_path = route.marks
        if same_path is None:
            return Marks(self._envelope_beside(path))
        # The answer is 405, for which nobody reads a body that is no JSON.
        return Marks(same_path.envelope, streams_body=same_path.streams_body)

    def _envelope_beside(self, path: str) -> Envelope:
        """The envelope of all routes with the same first segment, if they have the same one."""
        envelopes = self._envelopes.get(_first_segment(path), set())
        return next(iter(envelopes)) if len(envelopes) == 1 else "native"


def mount_all(app: FastAPI, mounts: Iterable[Mount]) -> None:
    mounts = tuple(mounts)
    for mount in mounts:
        for route in mount.routes:
            if isinstance(route, APIRoute):
                # FastAPI calls it for each application. It has no other place to replace the request of all routes.
                setattr(route, "get_route_handler", partial(_route_handler, route))  # noqa: B010
        app.include_router(mount.router, tags=[mount.tag], responses=ERROR_RESPONSES[mount.envelope])
    app.state.route_index = RouteIndex(mounts)


def marks_of(scope: Scope) -> Marks:
    """The marks of the route that answers this request."""
    marks: Marks | None = scope.get(MARKS_SCOPE_KEY)
    if marks is None:
        index: RouteIndex = scope["app"].state.route_index
        marks = scope[MARKS_SCOPE_KEY] = index.find(scope.get("method", WEBSOCKET), scope["path"])
    return marks


def marks_of_route(mount: Mount, route: Route) -> Marks:
    access = access_of(route)
    if access is None:
        raise IncompleteMarks(
            f"{route.path} has no access mark: use CurrentCaller or AdminCaller, or mark it with @access."
        )
    return Marks(mount.envelope, access, rate_limit_of(route), has_streamed_body(route))


def methods_of(route: Route) -> set[str]:
    return (route.methods or set()) if isinstance(route, APIRoute) else {WEBSOCKET}


def _route_handler(route: APIRoute) -> Callable[[Request], Awaitable[Response]]:
    handle = APIRoute.get_route_handler(route)

    async def handle_checked(request: Request) -> Response:
        if route.body_field:
            await refuse_many_mistakes(request.scope, route.body_field.field_info.annotation)
        return await handle(CheckedRequest(request.scope, request.receive))

    return handle_checked


def _beginnings(path: str, depth: int) -> Iterator[str]:
    """The path and its prefixes, the longest first: /a/b, /a/, /. At most `depth` prefixes, because a client may send
    any number of segments."""
    yield path
    ends: list[int] = []
    while len(ends) < depth and (end := path.find("/", ends[-1] if ends else 0) + 1):
        ends.append(end)
    for end in reversed(ends):
        yield path[:end]


def _first_segment(path: str) -> str:
    return path[1:].partition("/")[0]
