"""API5, broken function level authorization: what a user wants of the functions of administrators."""

from collections.abc import Iterator

import pytest
from fastapi.routing import APIRoute

from cluster import identity
from serve.http.marks import access_of
from serve.http.mounts import methods_of
from serve.routes import MOUNTS
from tests.support.api_client import ApiClient

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

ADMIN_ROUTES = sorted(
    (method, route.path_format.replace("{", "").replace("}", ""))
    for mount in MOUNTS
    for route in mount.routes
    if isinstance(route, APIRoute) and access_of(route) == "admin"
    for method in methods_of(route)
)
OVERRIDES = ("X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override")
REWRITES = ("X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Prefix", "X-Forwarded-Path")


def other_spellings(path: str) -> Iterator[str]:
    """Paths that a proxy, or a careless comparison, may take for the same."""
    head, _, last = path.rpartition("/")
    yield from (f"{path}/", f"/{path}", f"{head}//{last}", f"{head}/./{last}", f"{head}/x/../{last}")
    yield from (path.upper(), path.title(), f"{path};x=y", f"{path}%20", f"{path}%00", f"{path}.json")
    yield from (f"{head}/%2e/{last}", f"{head}%2f{last}", f"{path}?_method=GET")


async def test_spell_the_path_of_an_administrators_function_otherwise(api: ApiClient) -> None:
    assert len(ADMIN_ROUTES) > 30
    for method, path in ADMIN_ROUTES:
        for spelling in (path, *other_spellings(path)):
            response = await api.request("ada", method, f"https://api.example{spelling}", content=b"{}")
            assert response.status_code in {400, 403, 404, 405, 307}, (method, spelling, response.text)
            if response.status_code == 307:
                assert response.headers["location"].endswith(path)


async def test_name_another_method_or_path_in_a_header(api: ApiClient) -> None:
    """The route that is allowed answers, or none: never the one that is named."""
    job = await api.queue_job("probe", {}, "bob")
    for header in OVERRIDES:
        response = await api.request("ada", "GET", "/api/services", headers={header: "POST"})
        assert response.json() == []
        deleted = await api.request("bob", "GET", f"/api/v1/jobs/{job}", headers={header: "DELETE"})
        assert deleted.json()["state"] == "queued"
    for header in REWRITES:
        for _, path in ADMIN_ROUTES[:5]:
            response = await api.request("ada", "GET", "/api/v1/ping", headers={header: path})
            assert response.json() == {"status": "ok"} or response.json().keys() == {"pong"}, response.text


async def test_go_on_as_an_administrator_with_an_old_token(api: ApiClient) -> None:
    """The role is that of the account now, not the one at the time of the login or of the key."""
    async with api.database.transaction() as session:
        _, key = await identity.create_key(session, api.users["admin"].id, "old")
    token = api.authorization("admin")
    credentials = ({"Authorization": token}, {"X-API-Key": key})
    for headers in credentials:
        assert (await api.http.get("/api/v1/repos", headers=headers)).status_code == 200
    async with api.database.transaction() as session:
        user = await session.get_one(identity.User, api.users["admin"].id)
        user.role = "user"
    for headers in credentials:
        assert (await api.http.get("/api/v1/repos", headers=headers)).status_code == 403
        mine = (await api.http.get("/api/v1/auth/me", headers=headers)).json()
        assert mine["role"] == "user"
