"""Builds the engine of an installation: a router over its deployments and its Ollama server."""

from cluster.settings import get_settings
from serve.engines.deployment_client import DeploymentEngine
from serve.engines.ollama.engine import OllamaEngine
from serve.engines.protocol import Engine, ModelFolder, OllamaModel
from serve.engines.router import EngineRouter

GGUF, TRANSFORMERS = "gguf", "transformers"


def build_engine(*, separate_loop: bool = False) -> Engine:
    """`separate_loop`: for a process with short-lived event loops, such as a worker that runs jobs."""
    folders = DeploymentEngine(TRANSFORMERS, "transformers_replicas", separate_loop=separate_loop)
    ollama_engine = OllamaEngine(get_settings().ollama.url)
    return EngineRouter(
        DeploymentEngine(GGUF, "replicas", separate_loop=separate_loop),
        {ModelFolder: folders, OllamaModel: ollama_engine},
    )
