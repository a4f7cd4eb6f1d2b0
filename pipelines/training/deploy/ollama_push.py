"""Push a deployed version to an Ollama server with Ollama's client: as NAME:v3, and then as NAME:latest."""

from collections.abc import Generator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from cluster.errors import ForgearrError, Unavailable
from cluster.settings import get_settings
from pipelines.training.models.versions import Version

CONNECT_TIMEOUT_SECONDS = 10
READ_TIMEOUT_SECONDS = 900  # while the server reads, checks and copies a file of many GB
NOT_FOUND = 404
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"


class OllamaUnavailable(Unavailable):
    """The Ollama server does not answer."""

    code = "OLLAMA_UNAVAILABLE"


class OllamaRefused(ForgearrError):
    """The Ollama server refused a model."""

    code = "OLLAMA_REFUSED"


def push(url: str, version: Version, path: Path) -> dict[str, str]:
    """Create a model from this file on the server. The file is uploaded only if it is missing; repeating is safe."""
    import httpx
    import ollama

    digest = f"sha256:{version.files[0].sha256}"
    timeout = httpx.Timeout(READ_TIMEOUT_SECONDS, connect=CONNECT_TIMEOUT_SECONDS)
    with translate_errors(url), ollama.Client(host=url, timeout=timeout, follow_redirects=False) as client:
        # Ollama's client can upload a blob, but not ask whether it exists.
        if httpx.head(f"{url.rstrip('/')}/api/blobs/{digest}", timeout=CONNECT_TIMEOUT_SECONDS).is_error:
            client.create_blob(path)
        for _ in client.create(
            model=version.reference, files={version.files[0].name: digest}, stream=True, **_create_options(path)
        ):
            pass  # each item is a status of the server; a failure raises
    set_latest(url, version)
    return {"url": url, "model": version.reference, "latest": f"{version.name}:latest", "digest": digest}


def set_latest(url: str, version: Version) -> None:
    """Make NAME:latest a version that the server already has."""
    with translate_errors(url), _quick_client(url) as client:
        client.copy(version.reference, f"{version.name}:latest")


def remove_latest(url: str, name: str) -> None:
    """Remove the name NAME:latest, if the server has it. The versions stay there."""
    import ollama

    with translate_errors(url), _quick_client(url) as client:
        try:
            client.delete(f"{name}:latest")
        except ollama.ResponseError as error:
            if error.status_code != NOT_FOUND:
                raise


def _quick_client(url: str) -> Any:
    import ollama

    return ollama.Client(host=url, timeout=CONNECT_TIMEOUT_SECONDS, follow_redirects=False)


def _create_options(path: Path) -> dict[str, Any]:
    """Template and parameters. For a template that we do not know, the server derives its own from the file."""
    template, context = _read_gguf_metadata(path)
    parameters: dict[str, Any] = {"num_ctx": min(context or 2**31, get_settings().engines.context)}
    if TURN_START not in template:
        return {"parameters": parameters}
    parameters["stop"] = [TURN_START, TURN_END]
    template = files("configs").joinpath("ollama/chatml.gotmpl").read_text().removesuffix("\n")
    return {"template": template, "parameters": parameters}


def _read_gguf_metadata(path: Path) -> tuple[str, int | None]:
    """The chat template in a GGUF file, and the context length of its model."""
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def read(key: str) -> Any:
        field = reader.get_field(key)
        return field and field.contents()

    context = read(f"{read('general.architecture')}.context_length")
    return cast(str, read("tokenizer.chat_template") or ""), context and int(context)


@contextmanager
def translate_errors(url: str) -> Generator[None]:
    import httpx
    from ollama import ResponseError

    try:
        yield
    except (ConnectionError, httpx.HTTPError) as error:
        raise OllamaUnavailable(f"The Ollama server at {url} does not answer ({type(error).__name__}).") from error
    except ResponseError as error:
        if error.status_code >= 500 or error.status_code == 429:
            raise OllamaUnavailable(f"The Ollama server at {url} failed: {error}.") from error
        raise OllamaRefused(f"The Ollama server at {url} refused: {error.error}.") from error
