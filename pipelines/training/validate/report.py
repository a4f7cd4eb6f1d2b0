"""What a validation has measured, for people (Markdown, with a picture) and for programs (JSON)."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.training.data.samples import Sample
from pipelines.training.validate.metrics import Measured, Prepared

MARKDOWN, JSON, PICTURE = "validation_report.md", "validation_report.json", "validation.png"
SHOWN_SAMPLES = 10
SHOWN_CHARACTERS = 600
LINES = {"base": "solid", "tuned": "solid", "gguf": "dashed"}
"""A GGUF that is as it should be hides the line of the trained model."""

ROWS = (
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
    conversations: Sequence[Sample], prepared: Sequence[Prepared], measured: Mapping[str, Sequence[Measured]]
) -> list[dict[str, Any]]:
    """Each sample with what every model makes of it."""
    return [
        {
            "messages": conversation.model_dump(exclude_none=True)["messages"],
            "expected": [question.expected for question in prepared[number].questions],
            "models": {which: rows[number] for which, rows in measured.items()},
        }
        for number, conversation in enumerate(conversations)
    ]


def write(facts: Mapping[str, Any], place: Path) -> list[Path]:
    """The report, its picture and the facts as JSON; in this folder."""
    markdown, document = place / MARKDOWN, place / JSON
    markdown.write_text(_markdown(facts))
    document.write_text(json.dumps(_finite(facts), indent=2))
    return [markdown, document, _picture(facts, place / PICTURE)]


def _markdown(facts: Mapping[str, Any]) -> str:
    metrics, exported = facts["metrics"], facts["export"]
    verdict = "Passed" if facts["passed"] else "Did not pass"
    lines = [
        f"# Validation of {facts['name']}",
        "",
        f"**{verdict}.** {metrics['samples']} samples that the training has not seen, with {metrics['answers']} "
        f"answers of {int(metrics['tokens'])} tokens. Trained by {facts['job_id']} from {facts['base_model']}.",
        "",
        *[f"- {reason}" for reason in facts["reasons"]],
        *([""] if facts["reasons"] else []),
        f"| | base | tuned |{' GGUF |' if exported else ''}",
        f"|---|---|---|{'---|' if exported else ''}",
        *[_row(title, names, metrics, bool(exported)) for title, *names in ROWS if exported or names[0]],
        "",
        f"The GGUF is {exported['files'][0]['name']} ({exported['files'][0]['bytes']} bytes)." if exported else "",
        "",
        f"![Loss of each sample, and quality of the answers]({PICTURE})",
        "",
        "## Gates",
        "",
        "| Gate | Limit |",
        "|---|---|",
        *[f"| {gate} | {'none' if limit is None else f'{limit:g}'} |" for gate, limit in facts["gates"].items()],
        "",
        "## Answers",
        "",
    ]
    for sample in facts["samples"][:SHOWN_SAMPLES]:
        lines += _answers(sample)
    if len(facts["samples"]) > SHOWN_SAMPLES:
        lines += [f"These are the first {SHOWN_SAMPLES}; all {len(facts['samples'])} are in {JSON}.", ""]
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
        before = sample["messages"][turns[turn] - 1] if turns[turn] else {"role": "system", "content": ""}
        lines += [f"**{before['role']}**", "", *_quoted(before.get("content") or ""), "", "**expected**", ""]
        lines += [*_quoted(expected), ""]
        for which, row in sample["models"].items():
            lines += [f"**{which}**", "", *_quoted(row["answers"][turn]), ""]
    return [*lines, "---", ""]


def _quoted(text: str) -> list[str]:
    """As code, so that nothing in it is taken for Markdown; a fence longer than any in it."""
    shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"
    fence = "```"
    while fence in shown:
        fence += "`"
    return [fence, shown, fence]


def _picture(facts: Mapping[str, Any], path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, qualities = figure.subplots(1, 2)
    models = [which for which in ("base", "tuned", "gguf") if which in facts["samples"][0]["models"]]
    for which in models:
        rows = [sample["models"][which] for sample in facts["samples"]]
        each = sorted(row["loss"] / row["tokens"] for row in rows if row["tokens"])
        losses.plot(range(1, len(each) + 1), each, marker="o", markersize=3, linestyle=LINES[which], label=which)
    losses.set(title="Loss of each sample, in order", xlabel="samples", ylabel="loss")
    losses.xaxis.get_major_locator().set_params(integer=True)
    losses.legend()
    shown = [(title, names) for title, *names in ROWS if names[0] and ("ROUGE" in title or "Exact" in title)]
    width = 0.8 / len(models)
    for place, which in enumerate(models):
        column = ("base", "tuned", "gguf").index(which)
        values = [facts["metrics"][names[column]] or 0 for _, names in shown]
        qualities.bar([number + place * width for number in range(len(shown))], values, width, label=which)
    middle = width * (len(models) - 1) / 2
    qualities.set_xticks([number + middle for number in range(len(shown))], [title for title, _ in shown])
    qualities.set(title="Answers", ylim=(0, 1))
    figure.savefig(path, dpi=110)
    return path


def _finite(value: Any) -> Any:
    """JSON has no infinity: what is too large to say is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
