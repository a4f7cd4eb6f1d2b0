"""`forgearr models` and `forgearr chat`: list models, and talk to one."""

import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from itertools import chain
from typing import Annotated, Any

import typer
from rich.markup import escape

from cluster.cli.client import call, stream
from cluster.cli.console import console as new_console
from cluster.cli.console import table
from cluster.errors import ForgearrError

MB = 1_000_000
POLL_SECONDS = 1.0
VERDICTS = {True: "[green]yes[/]", False: "[red]no[/]", None: "-"}

console = new_console()


class AnswerInterrupted(ForgearrError):
    """The answer was interrupted."""

    code = "ANSWER_BROKEN_OFF"


def models(as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """List models with all their versions."""
    found = _all_models()
    if as_json:
        console.print_json(data=found)
        return
    rows = table("Model", "Version", "Seen by", "Served", "Size", "Quantization", "Passed", "Created")
    for model in found:
        for version in model["versions"]:
            files = version["files"]
            rows.add_row(
                model["name"],
                f"v{version['version']}",
                "its owner" if version["visibility"] == "private" else "all",
                "[green]served[/]" if version["version"] == model["served_version"] else "",
                f"{files[0]['bytes'] / MB:.1f} MB",
                ", ".join(file["quantization"] for file in files),
                VERDICTS[version["passed"]],
                version["created_at"][:19].replace("T", " "),
            )
    console.print(rows)


def chat(
    model: Annotated[str, typer.Argument(help="NAME (the version that is served), NAME:v3, or forgearr/tiny.")],
    message: Annotated[str | None, typer.Argument(help="One question; without it, a conversation.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Maximum length of an answer.")] = None,
) -> None:
    """Talk to a model. Ctrl-D ends a conversation."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    options = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
    if message is not None:
        _answer(options, [*messages, {"role": "user", "content": message}])
        return
    while (question := _question()) is not None:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": _answer(options, messages)})


def _all_models() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while True:
        page = call("GET", "/api/v1/models", params={"skip": len(found), "limit": 100})
        found += page["items"]
        if len(found) >= page["total"]:
            return found


def _question() -> str | None:
    """Read the next line that is not empty. None at the end of the input."""
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            typer.echo("> ", nl=False)
        line = sys.stdin.readline()
        if not line:
            return None
        if line.strip():
            return line.strip()


def _answer(options: dict[str, Any], messages: list[dict[str, Any]]) -> str:
    """Print an answer as it comes, and return it."""
    request_options = {name: value for name, value in options.items() if value is not None}
    texts: list[str] = []
    chunks = stream("/v1/chat/completions", {**request_options, "messages": messages, "stream": True})
    with _loading_status():
        first = next(chunks, None)
    for chunk in chain([first] if first else [], chunks):
        if "error" in chunk:
            typer.echo()
            raise AnswerInterrupted(f"The answer was interrupted: {chunk['error']['message']}")
        for choice in chunk["choices"]:
            text = choice["delta"].get("content") or ""
            texts.append(text)
            typer.echo(text, nl=False)
            sys.stdout.flush()
    typer.echo()
    return "".join(texts)


@contextmanager
def _loading_status() -> Generator[None]:
    """Show the progress of models that are being loaded, until the block ends."""
    received = threading.Event()

    def poll() -> None:
        while not received.wait(POLL_SECONDS):
            try:
                models = call("GET", "/api/v1/engines")["models"]
            except ForgearrError:
                return  # the chat request itself reports the error
            status.update(", ".join(_progress(model) for model in models if model["phase"] != "loaded"))

    with console.status("") as status:
        poller = threading.Thread(target=poll, daemon=True)
        poller.start()
        try:
            yield
        finally:
            received.set()
            poller.join()


def _progress(model: dict[str, Any]) -> str:
    percentage = "" if model["progress"] is None else f" {model['progress']:.0%}"
    return f"{escape(model['model'])}: {model['phase']}{percentage}"
