"""`forgearr demo`: test an untrained model, train it on the samples in configs/demo, and test it again."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any

from rich.markup import escape

from cluster.cli import train
from cluster.cli.client import call, server_url
from cluster.cli.console import console as new_console
from cluster.cli.console import table

BASE_MODEL, TRAINED_MODEL = "forgearr/tiny", "homelab:latest"
SHOWN_QUESTIONS = ("What does Sonarr do?", "Find the movie Inception.")
MAX_CONCURRENCY = 4

Exchange = tuple[dict[str, Any], str]
"""A request (messages and tools), and the answer that the model shall learn."""


def demo() -> None:
    """Train forgearr/tiny on homelab questions, and compare its answers. Exit 1 if they are no better."""
    import yaml

    from cluster.settings import get_settings, mask_url

    console = new_console()
    exchanges = _exchanges()
    console.print(f"1. {BASE_MODEL} is a model of 3 million parameters that has learned nothing. Asking it:")
    before = _ask_all(BASE_MODEL, exchanges)
    console.print(f"   {_score(before, exchanges)} of {len(exchanges)} questions answered as they should be.\n")

    recipe = yaml.safe_load((files("configs") / "recipes" / "tiny.yaml").read_text())
    console.print(f"2. Training it on {recipe['data']['dataset']}; then exporting, validating and serving it:")
    job = train.watch(train.submit(recipe))
    if job["state"] != "succeeded" or not job["result"]["deploy"]:
        console.print(escape((job["error"] or {}).get("message", "It was not deployed.")), style="red", soft_wrap=True)
        if job["result"]:
            train.show_result(job["result"])
        sys.exit(1)
    train.show_result(job["result"])

    console.print(f"\n3. Asking {TRAINED_MODEL} the same:")
    after = _ask_all(TRAINED_MODEL, exchanges)
    console.print(f"   {_score(after, exchanges)} of {len(exchanges)} questions answered as they should be.\n")
    rows = table("Question", "Before", "After")
    for (request, _), old, new in zip(exchanges, before, after, strict=True):
        question = request["messages"][-1]["content"]
        if question in SHOWN_QUESTIONS:
            rows.add_row(question, escape(_printable(old)), escape(new))
    console.print(rows)

    settings = get_settings()
    run = call("GET", f"/api/v1/jobs/{job['id']}")["mlflow_run_id"]
    mlflow = mask_url(settings.mlflow_uri) if settings.mlflow_uri else "off"
    console.print(f"MLflow         {mlflow}" + (f"/#/runs/{run}" if run else ""), soft_wrap=True)
    console.print(f"API            {server_url()}/docs")
    console.print(f"Ray dashboard  http://127.0.0.1:{settings.ray.dashboard_port}")
    console.print("`forgearr access` shows the passwords for MLflow and the dashboard.")
    if _score(after, exchanges) <= _score(before, exchanges):
        console.print("The trained model does no better than the untrained one.", style="red")
        sys.exit(1)


def _exchanges() -> list[Exchange]:
    """Return the first exchange of every sample."""
    exchanges: list[Exchange] = []
    for line in (files("configs") / "demo" / "homelab.jsonl").read_text().splitlines():
        sample = json.loads(line)
        messages: list[dict[str, Any]] = sample["messages"]
        first = next(number for number, message in enumerate(messages) if message["role"] == "assistant")
        request = {"messages": messages[:first], **({"tools": sample["tools"]} if sample.get("tools") else {})}
        calls = [call["function"] for call in messages[first].get("tool_calls", [])]
        exchanges.append((request, _format_answer(messages[first].get("content"), calls)))
    return exchanges


def _ask_all(model: str, exchanges: list[Exchange]) -> list[str]:
    """Send all questions with OpenAI's own client, as any program would."""
    import os

    from openai import OpenAI

    key = os.environ.get("FORGEARR_API_KEY", "not-needed")
    client = OpenAI(base_url=f"{server_url()}/v1", api_key=key)

    def ask(exchange: Exchange) -> str:
        completion = client.chat.completions.create(model=model, max_tokens=80, temperature=0, **exchange[0])
        message = completion.choices[0].message
        calls = [call.function.model_dump() for call in message.tool_calls or [] if call.type == "function"]
        return _format_answer(message.content, calls)

    with client, ThreadPoolExecutor(MAX_CONCURRENCY) as threads:
        return list(threads.map(ask, exchanges))


def _format_answer(content: str | None, calls: list[dict[str, Any]]) -> str:
    """Return an answer as one line: its text, then its tool calls."""
    texts = [content.strip()] if content and content.strip() else []
    return " ".join([*texts, *(f"{call['name']}({_canonical_json(call['arguments'])})" for call in calls)])


def _canonical_json(arguments: str) -> str:
    try:
        return json.dumps(json.loads(arguments), sort_keys=True)
    except json.JSONDecodeError:
        return arguments  # a model may produce invalid JSON


def _score(answers: list[str], exchanges: list[Exchange]) -> int:
    return sum(answer == expected for answer, (_, expected) in zip(answers, exchanges, strict=True))


def _printable(text: str) -> str:
    """Return the first characters of an untrained model's answer, in a form that a terminal can show."""
    return "".join(character if character.isprintable() else "·" for character in text)[:120]
