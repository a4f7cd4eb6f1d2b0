"""A model that hangs on one message takes its engine's process with it, and nothing else, on a whole platform."""

from pathlib import Path
from threading import Thread

import httpx
import ollama
import pytest

from tests.support.platform import Platform, running_platform
from tests.support.small_models import replace_template, write_model
from tests.support.waiting import TIMEOUT, eventually

pytestmark = [pytest.mark.platform, pytest.mark.deep]

HANGS = (
    "{% if messages[0].content == 'boom' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}{% endif %}{{ messages[0].content }}"
)
ENGINE = "ray::ServeReplica:forgearr:gguf"


def test_others_are_answered_after_a_template_hangs(tmp_path: Path) -> None:
    file = replace_template(write_model(tmp_path / "model.gguf"), tmp_path / "evil.gguf", HANGS)
    with running_platform({"engines.stall_timeout": "3s", "engines.slots": "1"}) as platform:
        with ollama.Client(host=platform.url) as client:
            client.create("evil", files={"evil.gguf": client.create_blob(file)})
        assert ask(platform, "evil", "Hello").is_success
        (hanging,) = platform.processes(ENGINE)
        asking = Thread(target=ask, args=(platform, "evil", "boom"), daemon=True)
        asking.start()
        eventually(lambda: platform.processes(ENGINE) and hanging not in platform.processes(ENGINE))
        eventually(lambda: ask(platform, "evil", "Hello").is_success)
        asking.join(TIMEOUT)


def ask(platform: Platform, model: str, content: str) -> httpx.Response:
    request = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 2}
    return platform.http.post("/v1/chat/completions", json=request, timeout=TIMEOUT)
