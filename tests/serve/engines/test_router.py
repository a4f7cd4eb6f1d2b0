"""Which engine answers: two real ones, each with a model that says who it is."""

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
FILE = ModelFile("house.gguf", "q8_0", "", 1)
VERSION = Version("house", 3, "run", [FILE], None, "forgearr/tiny", "job_1", "job_2", True, NOW)
FOLDER = ModelFolder("/models/house", "forgearr/tiny", NOW)
HELLO: EngineRequest = {"messages": [{"role": "user", "content": "Hello"}]}
SPOKEN = {VERSION.reference: "I run GGUF models.", "job_3": "I run folders."}


@pytest.fixture
def engine(home: Path, tmp_path: Path) -> EngineRouter:
    def one(name: str) -> GgufEngine:
        file = write_constant_model(tmp_path / f"{name}.gguf", SPOKEN[name])

        async def find_file(reference: str, source: Source, tell: OnProgress) -> Path:
            return file

        return GgufEngine(get_settings().engines, find_file)

    return EngineRouter(one(VERSION.reference), {ModelFolder: one("job_3")})


@pytest.mark.parametrize(("reference", "source"), [(VERSION.reference, VERSION), ("job_3", FOLDER)])
async def test_the_source_decides_who_answers(engine: EngineRouter, reference: str, source: Source) -> None:
    whole = await engine.complete(reference, HELLO, source)
    heard = await collect(engine.chat(reference, HELLO, source))
    assert whole["choices"] == heard["choices"]
    assert whole["choices"][0]["message"]["content"] == SPOKEN[reference]


async def test_all_that_is_in_memory_is_told_of_and_let_go(engine: EngineRouter) -> None:
    await engine.load(VERSION.reference, VERSION)
    await engine.load("job_3", FOLDER)
    assert [held.reference for held in await engine.loaded()] == [VERSION.reference, "job_3"]
    assert await engine.unload("job_3", FOLDER)
    assert [held.reference for held in await engine.loaded()] == [VERSION.reference]
