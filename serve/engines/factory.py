"""The engines that an installation has, as one."""

from cluster.settings import get_settings
from serve.engines.deployment_client import RemoteEngine
from serve.engines.ollama.engine import OllamaEngine
from serve.engines.protocol import Engine, Folder, Remote
from serve.engines.router import ChosenEngine

GGUF, TRANSFORMERS = "gguf", "transformers"


def installed(*, apart: bool = False) -> Engine:
    """`apart`: for a process whose event loops come and go, as those of jobs do."""
    folders = RemoteEngine(TRANSFORMERS, "transformers_replicas", apart=apart)
    elsewhere = OllamaEngine(get_settings().ollama.url)
    return ChosenEngine(RemoteEngine(GGUF, "replicas", apart=apart), {Folder: folders, Remote: elsewhere})
