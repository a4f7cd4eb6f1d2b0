"""Permanent processes stay small: none of them loads libraries that only training and engines need."""

import subprocess
import sys

import pytest

from tests.support.waiting import TIMEOUT

HEAVY = [
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "mlflow",
    "xllamacpp",
    "llama_cpp",
    "matplotlib",
    "ray.train",
]


@pytest.mark.deep
@pytest.mark.parametrize(
    "code",
    [
        "import serve.app, serve.gateway; serve.app.create_app()",
        "import serve.app, serve.engines.gguf.replica, serve.engines.transformers.replica, cluster.runtime.bootstrap",
        "import jobs.dispatch.dispatcher; from jobs.registry import kinds; kinds()",
        "import cluster.cli; from typer.main import get_command; get_command(cluster.cli.app)",
    ],
    ids=["gateway", "bring-up", "dispatcher", "command line"],
)
@pytest.mark.usefixtures("home")
def test_no_heavy_library_is_loaded(code: str) -> None:
    script = f"{code}; import sys; print(*(name for name in {HEAVY} if name in sys.modules))"
    loaded = subprocess.check_output([sys.executable, "-c", script], text=True, timeout=TIMEOUT)
    assert loaded.split() == []
