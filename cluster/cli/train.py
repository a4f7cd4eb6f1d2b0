"""`forgearr train`: train a model from data, and serve it."""

import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from cluster.cli.client import RetryPolicy, call, poll
from cluster.cli.console import console as new_console
from cluster.cli.jobs import read_spec
from cluster.errors import InvalidRequest

console = new_console()

FINISHED_STATUSES = {"completed", "failed", "cancelled"}
POLL_SECONDS = 1.5


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file with the spec of a forge job, or a shipped recipe, such as tiny.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A JSONL file of samples, a folder of documents, or a dataset's name.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
    base_model: Annotated[str | None, typer.Option(help="A hub id, a folder, NAME:v3 or forgearr/tiny.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value of the spec; may be repeated.")] = None,
    deploy: Annotated[bool, typer.Option(help="Serve it as NAME:latest if it passes its validation.")] = True,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the job.")] = False,
) -> None:
    """Fine-tune, export, validate and serve a model. Exit 1 unless all of that succeeds."""
    spec = read_spec(_recipe_path(recipe), settings or [])
    spec |= {key: value for key, value in (("name", name), ("base_model", base_model)) if value is not None}
    if data is not None:
        spec["data"] = _data_spec(data)
    if not deploy:
        spec["deploy"] = False
    job_id = submit(spec)
    console.print(f"Job {job_id}")
    if detach:
        return
    job = watch(job_id)
    if job["state"] != "succeeded":
        console.print(f"{job_id} {job['state']}: {escape((job['error'] or {}).get('message', ''))}", soft_wrap=True)
        sys.exit(1)
    show_result(job["result"])
    sys.exit(0 if job["result"]["passed"] or job["result"]["deploy"] else 1)


def submit(spec: dict[str, Any]) -> str:
    return call("POST", "/api/v1/jobs", json={"kind": "forge", "spec": spec})["id"]


def watch(job_id: str) -> dict[str, Any]:
    """Show a progress bar until a forge job has ended, and return the job."""
    columns = (
        TextColumn("{task.description:11}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("queued", total=100, note="")
        retry_policy = RetryPolicy()
        while True:
            status = poll(f"/status/{job_id}", retry_policy)
            bar.update(task, description=status["status"], completed=status["progress"], note=_note(status))
            if status["status"] in FINISHED_STATUSES:
                return poll(f"/api/v1/jobs/{job_id}", retry_policy)
            time.sleep(POLL_SECONDS)


def show_result(result: dict[str, Any]) -> None:
    """Print the result of a forge job."""
    metrics = result["validate"]["metrics"]
    console.print(f"\n{result['name']}:v{result['version']} {'passed' if result['passed'] else 'did not pass'}:")
    for label, before, after in (
        ("perplexity on held-out samples", metrics["base_perplexity"], metrics["perplexity"]),
        ("ROUGE-L of its answers", metrics["base_rouge_l"], metrics["rouge_l"]),
    ):
        console.print(f"  {label}: {_number(before)} before, {_number(after)} after")
    console.print(
        f"  exported file: same next token in {_percent(metrics['gguf_top1_agreement'])}, "
        f"KL {_number(metrics['gguf_kl'])}"
    )
    for reason in result["validate"]["reasons"]:
        console.print(f"  {escape(reason)}", style="red")
    console.print(f"  report: {result['validate']['report_path']}", soft_wrap=True)
    if result["deploy"]:
        console.print(f"Served as {result['deploy']['model_name']}: forgearr chat {result['name']}")


def shipped_recipes() -> list[str]:
    paths = [Path(file.name) for file in (files("configs") / "recipes").iterdir()]
    return sorted(file.stem for file in paths if file.suffix == ".yaml")


def _recipe_path(name_or_path: str | None) -> Path | None:
    if name_or_path is None or Path(name_or_path).suffix in {".yaml", ".yml", ".json"}:
        return Path(name_or_path) if name_or_path else None
    if name_or_path not in shipped_recipes():
        raise InvalidRequest(
            f"There is no recipe '{name_or_path}'. There are: {', '.join(shipped_recipes())}; or name a file."
        )
    return Path(str(files("configs") / "recipes" / f"{name_or_path}.yaml"))


def _data_spec(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return {"folder": str(path.resolve())}
    if not path.exists():
        return {"dataset": name_or_path}
    characters = (character if character.isalnum() else "-" for character in path.stem.lower())
    name = "".join(characters).strip("-") or "upload"
    dataset = call("POST", "/api/v1/datasets", params={"name": name}, content=path.read_bytes())
    console.print(f"Dataset {dataset['name']}:v{dataset['version']}, {dataset['samples']} samples")
    return {"dataset": dataset["id"]}


def _note(status: dict[str, Any]) -> str:
    if status["status"] != "training" or status["loss"] is None:
        return ""
    seconds_left = status["eta_seconds"]
    parts = [
        f"epoch {status['current_epoch']}/{status['total_epochs']}",
        f"step {status['current_step']}",
        f"loss {status['loss']:.3f}",
        f"{status['tokens_per_second']:.0f} tokens/s" if status["tokens_per_second"] else "",
        f"{seconds_left:.0f} s left" if seconds_left else "",
    ]
    return " · ".join(part for part in parts if part)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.1f} %"
