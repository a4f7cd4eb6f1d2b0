"""An engine that runs only while there are requests, on a whole platform."""

import httpx
import pytest

from tests.support.platform import Platform, running_platform
from tests.support.waiting import TIMEOUT, eventually

pytestmark = [pytest.mark.platform, pytest.mark.deep]

ENGINE = "ray::ServeReplica:forgearr:gguf"


def test_an_engine_starts_with_a_request_and_stops_when_idle() -> None:
    with running_platform({"engines.least_replicas": "0", "engines.idle_seconds": "2"}) as platform:
        assert not platform.processes(ENGINE)
        assert platform.http.get("/api/ps").json() == {"models": []}
        assert not platform.processes(ENGINE)  # listing loaded models starts no engine
        eventually(lambda: ask(platform).is_success and len(platform.processes(ENGINE)) == 1)
        eventually(lambda: not platform.processes(ENGINE))


def ask(platform: Platform) -> httpx.Response:
    request = {"model": "forgearr/tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    return platform.http.post("/v1/chat/completions", json=request, timeout=TIMEOUT)
