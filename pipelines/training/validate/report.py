"""Write the report of a validation: Markdown with plots for people, JSON for programs."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.training.data.samples import Sample
from pipelines.training.validate.metrics import PreparedSample, SampleMetrics

MARKDOWN_NAME, JSON_NAME, PICTURE_NAME = "validation_report.md", "validation_report.json", "validation.png"
SHOWN_SAMPLES = 10
SHOWN_CHARACTERS = 600
LINE_STYLES = {"base": "solid", "tuned": "solid", "gguf": "dashed"}
"""The line of a faithful GGUF covers that of the trained model, so it is dashed."""

TABLE_ROWS = (
    ("Loss (mean of tokens)", "base_loss", "final_loss", "gguf_loss"),
    ("Perplexity", "base_perplexity", "perplexity", "gguf_perplexity"),
    ("Exact answers", "base_exact_match", "exact_match", "gguf_exact_match"),
    ("ROUGE-L", "base_rouge_l", "rouge_l", "gguf_rouge_l"),
    ("ROUGE-1", "base_rouge_1", "rouge_1", "gguf_rouge_1"),
    ("Same likeliest token as the trained model", None, None, "gguf_top1_agreement"),
    ("KL divergence from it (nats)", None, None, "gguf_kl"),
    ("Prompts split into the same tokens", None, None, "gguf_same_tokens"),
)


def by_sample(
    conversations: Sequence[Sample], prepared: Sequence[PreparedSample], measured: Mapping[str, Sequence[SampleMetrics]]
) -> list[dict[str, Any]]:
    """Each sample, with the expected answers and every model's metrics."""
    return [
        {
            "messages": conversation.model_dump(exclude_none=True)["messages"],
            "expected": [question.expected for question in prepared[number].questions],
            "models": {model_key: rows[number] for model_key, rows in measured.items()},
        }
        for number, conversation in enumerate(conversations)
    ]


def write(report_data: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the report, its plots and the data as JSON into this folder."""
    markdown, document = folder / MARKDOWN_NAME, folder / JSON_NAME
    markdown.write_text(_markdown(report_data))
    document.write_text(json.dumps(_replace_infinite(report_data), indent=2))
    return [markdown, document, _picture(report_data, folder / PICTURE_NAME)]


def _markdown(report_data: Mapping[str, Any]) -> str:
    metrics, export_result = report_data["metrics"], report_data["export"]
    verdict = "Passed" if report_data["passed"] else "Did not pass"
    lines = [
        f"# Validation of {report_data['name']}",
        "",
        f"**{verdict}.** {metrics['samples']} samples that the training has not seen, with {metrics['answers']} "
        f"answers of {int(metrics['tokens'])} tokens. Trained by {report_data['job_id']} from "
        f"{report_data['base_model']}.",
        "",
        *[f"- {reason}" for reason in report_data["reasons"]],
        *([""] if report_data["reasons"] else []),
        f"| | base | tuned |{' GGUF |' if export_result else ''}",
        f"|---|---|---|{'---|' if export_result else ''}",
        *[
            _row(title, names, metrics, bool(export_result))
            for title, *names in TABLE_ROWS
            if export_result or names[0]
        ],
        "",
        f"The GGUF is {export_result['files'][0]['name']} ({export_result['files'][0]['bytes']} bytes)."
        if export_result
        else "",
        "",
        f"![Loss of each sample, and quality of the answers]({PICTURE_NAME})",
        "",
        "## Gates",
        "",
        "| Gate | Limit |",
        "|---|---|",
        *[f"| {gate} | {'none' if limit is None else f'{limit:g}'} |" for gate, limit in report_data["gates"].items()],
        "",
        "## Answers",
        "",
    ]
    for sample in report_data["samples"][:SHOWN_SAMPLES]:
        lines += _answers(sample)
    if len(report_data["samples"]) > SHOWN_SAMPLES:
        lines += [f"These are the first {SHOWN_SAMPLES}; all {len(report_data['samples'])} are in {JSON_NAME}.", ""]
    return "\n".join(lines)


def _row(title: str, names: Sequence[str | None], metrics: Mapping[str, Any], with_gguf: bool) -> str:
    shown = names if with_gguf else names[:2]
    return f"| {title} | {' | '.join(_number(metrics[name]) if name else '' for name in shown)} |"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _answers(sample: Mapping[str, Any]) -> list[str]:
    turns = [number for number, message in enumerate(sample["messages"]) if message["role"] == "assistant"]
    lines: list[str] = []
    for turn, expected in enumerate(sample["expected"]):
        previous = sample["messages"][turns[turn] - 1] if turns[turn] else {"role": "system", "content": ""}
        lines += [f"**{previous['role']}**", "", *_code_block(previous.get("content") or ""), "", "**expected**", ""]
        lines += [*_code_block(expected), ""]
        for model_key, row in sample["models"].items():
            lines += [f"**{model_key}**", "", *_code_block(row["answers"][turn]), ""]
    return [*lines, "---", ""]


def _code_block(text: str) -> list[str]:
    """Quote text as code, so that nothing in it is read as Markdown. The fence is longer than any in the text."""
    shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"
    fence = "```"
    while fence in shown:
        fence += "`"
    return [fence, shown, fence]


def _picture(report_data: Mapping[str, Any], path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, qualities = figure.subplots(1, 2)
    models = [model_key for model_key in ("base", "tuned", "gguf") if model_key in report_data["samples"][0]["models"]]
    for model_key in models:
        rows = [sample["models"][model_key] for sample in report_data["samples"]]
        sorted_losses = sorted(row["loss"] / row["tokens"] for row in rows if row["tokens"])
        losses.plot(
            range(1, len(sorted_losses) + 1),
            sorted_losses,
            marker="o",
            markersize=3,
            linestyle=LINE_STYLES[model_key],
            label=model_key,
        )
    losses.set(title="Loss of each sample, in order", xlabel="samples", ylabel="loss")
    losses.xaxis.get_major_locator().set_params(integer=True)
    losses.legend()
    shown = [(title, names) for title, *names in TABLE_ROWS if names[0] and ("ROUGE" in title or "Exact" in title)]
    width = 0.8 / len(models)
    for position, model_key in enumerate(models):
        column = ("base", "tuned", "gguf").index(model_key)
        values = [report_data["metrics"][names[column]] or 0 for _, names in shown]
        qualities.bar([number + position * width for number in range(len(shown))], values, width, label=model_key)
    middle = width * (len(models) - 1) / 2
    qualities.set_xticks([number + middle for number in range(len(shown))], [title for title, _ in shown])
    qualities.set(title="Answers", ylim=(0, 1))
    figure.savefig(path, dpi=110)
    return path


def _replace_infinite(value: Any) -> Any:
    """JSON has no infinity and no NaN: replace them by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _replace_infinite(item) for name, item in value.items()}
    return [_replace_infinite(item) for item in value] if isinstance(value, list | tuple) else value
