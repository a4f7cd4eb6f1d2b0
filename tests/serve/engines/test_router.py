"""The router of engines, with two real ones, each with a model that generates its own text."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from cluster.settings import get_settings
from pipelines.training.models.registry import OnProgress
from pipelines.training.models.versions import ModelFile, Version
from serve.engines.collect import collect
from serve.engines.gguf.replica import GgufEngine
from serve.engines.protocol import EngineRequest, ModelFolder, Source
from serve.engines.router import EngineRouter
from tests.support.small_models import write_constant_model

NOW = datetime.now(UTC)
FILE = ModelFile("assistant.gguf", "q8_0", "", 1)
VERSION = Version("assistant", 3, "run", [FILE], None, "forgearr/tiny", "job_1", "job_2", True, NOW)
FOLDER = ModelFolder("/models/assistant", "forgearr/tiny", NOW)
HELLO: EngineRequest = {"messages": [{"role": "user", "content": "Hello"}]}
TEXTS = {VERSION.reference: "I run GGUF models.", "job_3": "I run folders."}


@pytest.fixture
def engine(home: Path, tmp_path: Path) -> EngineRouter:
    def build(name: str) -> GgufEngine:
        file = write_constant_model(tmp_path / f"{name}.gguf", TEXTS[name])

        async def find_file(reference: str, source: Source, on_progress: OnProgress) -> Path:
            return file

        return GgufEngine(get_settings().engines, find_file)

    return EngineRouter(build(VERSION.reference), {ModelFolder: build("job_3")})


@pytest.mark.parametrize(("reference", "source"), [(VERSION.reference, VERSION), ("job_3", FOLDER)])
async def test_the_source_selects_the_engine(engine: EngineRouter, reference: str, source: Source) -> None:
    completion = await engine.complete(reference, HELLO, source)
    streamed = await collect(engine.chat(reference, HELLO, source))
    assert completion["choices"] == streamed["choices"]
    assert completion["choices"][0]["message"]["content"] == TEXTS[reference]


async def test_loaded_models_of_all_engines_are_listed_and_unloaded(engine: EngineRouter) -> None:
    await engine.load(VERSION.reference, VERSION)
    await engine.load("job_3", FOLDER)
    assert [held.reference for held in await engine.loaded()] == [VERSION.reference, "job_3"]
    assert await engine.unload("job_3", FOLDER)
    assert [held.reference for held in await engine.loaded()] == [VERSION.reference]
