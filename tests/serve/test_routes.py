"""The table of routers: each route has its marks, and the route of a request does not depend on the order."""

import re
from collections import defaultdict
from itertools import combinations

import httpx
import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute

from cluster.db import Database
from serve.app import create_app
from serve.http.errors import ERROR_RESPONSES
from serve.http.marks import Route, access, access_of
from serve.http.mounts import IncompleteMarks, Mount, RouteIndex, marks_of_route, methods_of
from serve.middleware.strict_input import MAX_BODY_BYTES
from serve.routes import MOUNTS
from serve.security.callers import AdminCaller, CurrentCaller

ROUTES = [(mount, route) for mount in MOUNTS for route in mount.routes]
STREAMING = [
    *("/api/v1/datasets", "/v1/files", "/v1/uploads/upload_1/parts"),
    f"/api/blobs/sha256:{'0' * 64}",
]


def test_no_literal_path_is_hidden_by_a_parameter() -> None:
    assert len(ROUTES) > 150
    routes = [route for _, route in ROUTES]
    hidden = [(later.path, earlier.path) for earlier, later in combinations(routes, 2) if _hides(earlier, later)]
    assert hidden == []


def test_a_hidden_route_is_detected() -> None:
    async def endpoint() -> None: ...

    assert _hides(APIRoute("/jobs/{job_id}", endpoint), APIRoute("/jobs/newest", endpoint))
    assert not _hides(APIRoute("/jobs/newest", endpoint), APIRoute("/jobs/{job_id}", endpoint))
    assert not _hides(APIRoute("/jobs/{job_id}", endpoint, methods=["POST"]), APIRoute("/jobs/newest", endpoint))


def test_every_operation_has_one_tag_and_one_envelope(home: object) -> None:
    marked = {
        (method.lower(), route.path_format): (mount, marks_of_route(mount, route))
        for mount, route in ROUTES
        if isinstance(route, APIRoute) and route.include_in_schema
        for method in methods_of(route)
    }
    paths = create_app().openapi()["paths"]
    operations = {(method, path): paths[path][method] for path in paths for method in paths[path]}
    assert operations.keys() == marked.keys()
    for operation, (mount, marks) in marked.items():
        assert operations[operation]["tags"] == [mount.tag]
        not_found = operations[operation]["responses"]["404"]["content"]
        assert not_found == ERROR_RESPONSES[marks.envelope][404]["content"], operation


def test_the_envelope_follows_from_the_api() -> None:
    for mount, route in ROUTES:
        expected = "openai" if route.path.startswith("/v1/") else "ollama" if mount.tag == "Ollama" else "native"
        assert mount.envelope == expected, route.path


def test_one_address_has_one_envelope() -> None:
    envelopes: dict[str, set[str]] = defaultdict(set)
    for mount, route in ROUTES:
        envelopes[route.path].add(mount.envelope)
    assert [path for path, names in envelopes.items() if len(names) > 1] == []


def test_a_route_without_an_access_class_is_refused() -> None:
    router = APIRouter()

    @router.get("/secrets")
    async def secrets() -> None: ...

    with pytest.raises(IncompleteMarks, match="/secrets has no access mark"):
        RouteIndex([Mount(router, "Test")])
    access("public")(secrets)
    assert RouteIndex([Mount(router, "Test")]).find("GET", "/secrets").access == "public"


def test_a_router_within_a_router_is_refused() -> None:
    outer, inner = APIRouter(), APIRouter()
    outer.include_router(inner)
    with pytest.raises(IncompleteMarks):
        RouteIndex([Mount(outer, "Test")])


def test_the_access_class_is_that_of_the_caller() -> None:
    async def by_user(caller: CurrentCaller) -> None: ...

    async def by_admin(caller: AdminCaller) -> None: ...

    assert access_of(APIRoute("/a", by_user)) == "user"
    assert access_of(APIRoute("/a", by_admin)) == "admin"


def test_the_index_finds_the_marks_of_every_route() -> None:
    index = RouteIndex(MOUNTS)
    for mount, route in ROUTES:
        for method in methods_of(route):
            assert index.find(method, _example(route.path)) == marks_of_route(mount, route), route.path
    # Starlette's patterns match this, too.
    assert index.find("POST", "/api/v1/config/audit\n").rate_limit == "audit"


@pytest.mark.parametrize(
    ("method", "path", "envelope"),
    [
        ("GET", "/v1/nothing", "openai"),
        ("PUT", "/v1/models/a/b", "openai"),
        ("PUT", "/api/chat", "ollama"),
        ("PUT", "/api/blobs/sha256:0", "ollama"),
        ("GET", "/api/nothing", "native"),
        ("GET", "/", "native"),
        ("GET", "", "native"),
        ("WEBSOCKET", "/v1/realtime", "openai"),
    ],
)
def test_an_unknown_path_has_the_envelope_of_its_prefix(method: str, path: str, envelope: str) -> None:
    marks = RouteIndex(MOUNTS).find(method, path)
    assert (marks.envelope, marks.access, marks.rate_limit) == (envelope, None, "general")


async def test_a_wrong_method_is_answered_without_a_look_at_the_body(database: Database) -> None:
    transport = httpx.ASGITransport(create_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        response = await client.request("TRACE", "/api/blobs/sha256:0", content=b"\x89PNG\r\n")
        assert (response.status_code, response.headers["allow"]) == (405, "HEAD, POST")


@pytest.mark.parametrize("path", STREAMING)
async def test_only_some_routes_accept_long_bodies(database: Database, path: str) -> None:
    headers = {"Content-Length": str(MAX_BODY_BYTES + 1)}
    transport = httpx.ASGITransport(create_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        assert (await client.post(path, content=b"x", headers=headers)).status_code != 413
        assert (await client.post(f"{path}/nothing", content=b"x", headers=headers)).status_code == 413


def _hides(earlier: Route, later: Route) -> bool:
    """Whether the earlier route would get every request for the later one."""
    return bool(methods_of(earlier) & methods_of(later)) and bool(re.match(earlier.path_regex, _example(later.path)))


def _example(path: str) -> str:
    """A path of this route. The values of its parameters are no literals of other routes."""
    return re.sub(r"\{[^}]+\}", "a-value-of-a-parameter", path)
