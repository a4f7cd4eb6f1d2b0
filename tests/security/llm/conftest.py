"""A model in this process that always says the same, behind the API with its users. It needs no registry."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from cluster.settings import get_settings
from pipelines.training.models.registry import OnProgress
from serve.engines.gguf.replica import GgufEngine
from serve.engines.protocol import Source
from tests.support.api_client import ApiClient
from tests.support.app_server import unload_models
from tests.support.small_models import write_constant_model

Say = Callable[[str], None]


@pytest.fixture
async def say(api: ApiClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Say]:
    """Let `forgearr/tiny` say this text from now on."""
    monkeypatch.setenv("FORGEARR_MLFLOW__ENABLED", "false")
    monkeypatch.setenv("FORGEARR_ENGINES__SLOTS", "1")
    get_settings.cache_clear()
    close: list[Callable[[], Awaitable[None]]] = []

    def let_it_say(text: str) -> None:
        file = write_constant_model(tmp_path / "model.gguf", text)

        async def find_file(reference: str, source: Source, on_progress: OnProgress) -> Path:
            return file

        engine = api.app.state.engine = GgufEngine(get_settings().engines, find_file)
        close.append(lambda: unload_models(engine))

    yield let_it_say
    for unload in close:
        await unload()
