"""The audit log over HTTP: what each act leaves there, and how administrators read it."""

from typing import Any

import httpx
import pytest

from cluster import audit_log, identity
from cluster.ownership import LOCAL
from serve.security import rate_limits
from tests.support.api_client import ApiClient

AUDIT_LOG = "/api/v1/audit-log"
PASSWORD = "correct horse battery"
LOGIN = {"email": "ada@example.com", "password": PASSWORD}


@pytest.fixture(autouse=True)
async def _password_of_ada(api: ApiClient) -> None:  # pyright: ignore[reportUnusedFunction]
    rate_limits.limiter.cache_clear()
    await api.set_password("ada", PASSWORD)


async def read(api: ApiClient, **filters: Any) -> list[dict[str, Any]]:
    response = await api.request("admin", "GET", AUDIT_LOG, params=filters)
    assert response.status_code == 200, response.text
    return response.json()["data"]


async def newest(api: ApiClient) -> tuple[str, str, str | None, str | None]:
    """Action, outcome, actor and target of the newest entry. All come from the client of the tests."""
    entry = (await read(api))[0]
    assert entry["address"] == "192.0.2.1"
    assert entry["request_id"]
    assert entry["created_at"].endswith("Z")
    return entry["action"], entry["outcome"], entry["actor"], entry["target"]


async def post(api: ApiClient, path: str, body: dict[str, Any]) -> httpx.Response:
    return await api.http.post(f"/api/v1/auth/{path}", json=body)


async def test_logins_are_recorded_with_their_outcome(api: ApiClient) -> None:
    tokens = (await post(api, "login", LOGIN)).json()
    assert await newest(api) == ("login", "succeeded", "ada", None)
    assert (await post(api, "login", {**LOGIN, "password": "a wrong guess"})).status_code == 401
    assert await newest(api) == ("login", "failed", None, "ada@example.com")
    assert (await post(api, "login", {**LOGIN, "email": PASSWORD})).status_code == 401
    assert await newest(api) == ("login", "failed", None, None)  # what was typed there may be a password
    used = {"refresh_token": tokens["refresh_token"]}
    renewed = (await post(api, "refresh", used)).json()
    assert (await post(api, "refresh", used)).status_code == 401
    assert await newest(api) == ("refresh", "refused", "ada", None)
    assert renewed["refresh_token"] not in str(await read(api))
    tokens = (await post(api, "login", LOGIN)).json()
    assert (await post(api, "logout", {"refresh_token": tokens["refresh_token"]})).status_code == 204
    assert await newest(api) == ("logout", "succeeded", "ada", None)
    async with api.database.transaction() as session:
        await identity.set_active(session, await identity.get_user(session, "ada@example.com"), False)
    assert (await post(api, "login", LOGIN)).status_code == 403
    assert await newest(api) == ("login", "refused", None, "ada@example.com")


async def test_accounts_keys_and_passwords_are_recorded(api: ApiClient) -> None:
    account = {"email": "eve@example.com", "username": "eve", "password": PASSWORD}
    assert (await api.request("admin", "POST", "/api/v1/auth/register", json=account)).status_code == 201
    assert await newest(api) == ("account.create", "succeeded", "admin", "eve@example.com")
    key = (await api.request("ada", "POST", "/api/v1/auth/keys", json={"name": "laptop"})).json()
    assert await newest(api) == ("key.create", "succeeded", "ada", key["id"])
    assert key["key"] not in str(await read(api))
    assert (await api.request("ada", "DELETE", f"/api/v1/auth/keys/{key['id']}")).status_code == 204
    assert await newest(api) == ("key.revoke", "succeeded", "ada", key["id"])
    change = {"current_password": "a wrong guess", "new_password": "another horse battery"}
    assert (await api.request("ada", "PUT", "/api/v1/auth/password", json=change)).status_code == 403
    assert await newest(api) == ("password.change", "failed", "ada", "ada@example.com")
    change["current_password"] = PASSWORD
    assert (await api.request("ada", "PUT", "/api/v1/auth/password", json=change)).status_code == 200
    assert await newest(api) == ("password.change", "succeeded", "ada", "ada@example.com")


async def test_deletions_are_recorded(api: ApiClient) -> None:
    file = {"file": ("notes.txt", b"hello")}
    headers = {"Authorization": f"Bearer {identity.create_access_token(api.users['ada'])}"}
    uploaded = await api.http.post("/v1/files", files=file, data={"purpose": "user_data"}, headers=headers)
    file_id = uploaded.json()["id"]
    assert (await api.request("bob", "DELETE", f"/v1/files/{file_id}")).status_code == 404
    assert await read(api) == []
    assert (await api.request("ada", "DELETE", f"/v1/files/{file_id}")).status_code == 200
    assert await newest(api) == ("file.delete", "succeeded", "ada", file_id)
    assert (await read(api))[0]["details"] == {"filename": "notes.txt"}

    sample = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'
    options = {"params": {"name": "greetings"}, "content": sample}
    dataset = (await api.request("ada", "POST", "/api/v1/datasets", **options)).json()
    assert (await api.request("ada", "DELETE", f"/api/v1/datasets/{dataset['id']}")).status_code == 204
    assert await newest(api) == ("dataset.delete", "succeeded", "ada", "greetings:v1")

    service = {"name": "TV", "type": "sonarr", "url": "http://127.0.0.1:9"}
    service_id = (await api.request("admin", "POST", "/api/services", json=service)).json()["id"]
    assert (await api.request("admin", "DELETE", f"/api/services/{service_id}")).status_code == 204
    assert await newest(api) == ("service.delete", "succeeded", "admin", "TV")


async def test_the_audit_log_is_filtered_and_read_in_pages(api: ApiClient) -> None:
    ada = identity.principal(api.users["ada"])
    for number in range(5):
        await audit_log.record_alone("file.delete", ada, f"file-{number}")
    await audit_log.record_alone("model.deploy", LOCAL, "homelab:v1", outcome="refused", reason="It did not pass.")
    first = (await api.request("admin", "GET", AUDIT_LOG, params={"limit": 4})).json()
    assert [entry["target"] for entry in first["data"]] == ["homelab:v1", "file-4", "file-3", "file-2"]
    assert first["has_more"]
    rest = (await api.request("admin", "GET", AUDIT_LOG, params={"limit": 4, "after": first["last_id"]})).json()
    assert ([entry["target"] for entry in rest["data"]], rest["has_more"]) == (["file-1", "file-0"], False)
    assert [entry["target"] for entry in await read(api, action="model.deploy")] == ["homelab:v1"]
    assert [entry["actor"] for entry in await read(api, outcome="refused")] == ["local"]
    assert len(await read(api, actor="ada")) == 5
    assert len(await read(api, target="file-3")) == 1
    moment = rest["data"][0]["created_at"]
    assert len(await read(api, created_after=moment)) + len(await read(api, created_before=moment)) == 6
    assert await read(api, actor="nobody") == []
    invalid = {"action": "eat", "outcome": "maybe", "after": "x", "limit": 101, "created_after": "yesterday"}
    for name, value in invalid.items():
        assert (await api.request("admin", "GET", AUDIT_LOG, params={name: value})).status_code == 422


async def test_nobody_changes_the_audit_log(api: ApiClient) -> None:
    await audit_log.record_alone("login", LOCAL)
    (entry,) = await read(api)
    assert (await api.request("ada", "GET", AUDIT_LOG)).status_code == 403
    for path in (AUDIT_LOG, f"{AUDIT_LOG}/{entry['id']}"):
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            assert (await api.request("admin", method, path)).status_code in {404, 405}
    assert await read(api) == [entry]
