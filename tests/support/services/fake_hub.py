"""A stand-in for the Hugging Face hub, which cannot be reached from tests. It answers by the hub's API documents."""

import json
from dataclasses import dataclass, field

from tests.support.services.stub_server import StubRequest, StubResponse, json_response

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"\x02\0\0\0\0\0\0\0{}"}


@dataclass
class FakeHub:
    """The repository `org/public` is for all, `org/private` and `org/gated` are for those who send the token."""

    token: str
    weight_bytes: int | None = None  # the size that it reports for the weights; None: the real one
    downloads: list[str] = field(default_factory=list[str])

    def answer(self, request: StubRequest) -> StubResponse:
        is_known = request.headers.get("authorization") == f"Bearer {self.token}"
        if "org/private" in request.path and not is_known:
            return StubResponse(status=401, headers={"X-Error-Code": "RepoNotFound"})
        if request.path.endswith("/auth-check"):
            return self._refuse_gated(request, is_known) or json_response({})
        if "/revision/" in request.path:
            return json_response(
                {"id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            )
        if "/tree/" in request.path:
            files = [{"type": "file", "path": name, "size": self._size(name), "oid": name} for name in FILES]
            return json_response(files)
        name = request.path.rpartition("/")[2]
        if name not in FILES:
            return StubResponse(status=404)
        if refusal := self._refuse_gated(request, is_known):
            return refusal
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        if request.method == "HEAD":
            return StubResponse(headers=headers, length=self._size(name))
        self.downloads.append(request.path)
        return StubResponse(FILES[name], content_type="application/octet-stream", headers=headers)

    def _refuse_gated(self, request: StubRequest, is_known: bool) -> StubResponse | None:
        if "org/gated" not in request.path or is_known:
            return None
        return StubResponse(json.dumps({"error": "gated"}).encode(), 403, headers={"X-Error-Code": "GatedRepo"})

    def _size(self, name: str) -> int:
        return self.weight_bytes if self.weight_bytes and name.endswith(".safetensors") else len(FILES[name])
