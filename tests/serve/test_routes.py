"""The table of routers: which route answers an address does not depend on their order."""

import re
from itertools import combinations

from fastapi.routing import APIRoute, APIWebSocketRoute

from serve.routes import ROUTERS

Route = APIRoute | APIWebSocketRoute


def test_a_literal_path_is_never_behind_a_parameter() -> None:
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, Route)]
    assert len(routes) > 150
    hidden = [(later.path, earlier.path) for earlier, later in combinations(routes, 2) if _hides(earlier, later)]
    assert hidden == []


def test_a_route_behind_a_parameter_would_be_found() -> None:
    async def answer() -> None: ...

    assert _hides(APIRoute("/jobs/{job_id}", answer), APIRoute("/jobs/newest", answer))
    assert not _hides(APIRoute("/jobs/newest", answer), APIRoute("/jobs/{job_id}", answer))
    assert not _hides(APIRoute("/jobs/{job_id}", answer, methods=["POST"]), APIRoute("/jobs/newest", answer))


def _hides(earlier: Route, later: Route) -> bool:
    """Whether every request for the later route would be answered by the earlier one."""
    return _is_same_method(earlier, later) and re.match(earlier.path_regex, _example(later.path)) is not None


def _is_same_method(one: Route, other: Route) -> bool:
    if isinstance(one, APIRoute) and isinstance(other, APIRoute):
        return bool(set(one.methods or ()) & set(other.methods or ()))
    return isinstance(one, APIWebSocketRoute) and isinstance(other, APIWebSocketRoute)


def _example(path: str) -> str:
    """An address of this route; a parameter's value is no literal of any other."""
    return re.sub(r"\{[^}]+\}", "a-value-of-a-parameter", path)
