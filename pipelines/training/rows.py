"""Samples as the rows that a trainer reads: held out or not, in tokens, and none longer than the model can read."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.errors import UnprocessableRequest
from pipelines.training.samples import Pair, Sample
from pipelines.training.tokens import IGNORED, encode, render

Row = dict[str, Any]
Numbered = tuple[int, Sample | Pair]


class SampleTooLong(UnprocessableRequest):
    """A sample is longer than the model's context."""

    code = "SAMPLE_TOO_LONG"


class NothingToTrain(UnprocessableRequest):
    """No sample is left to train on."""

    code = "NOTHING_TO_TRAIN"


@dataclass
class Rows:
    rows: list[Row] = field(default_factory=list[Row])
    tokens: int = 0
    truncated: int = 0
    skipped: int = 0


def split(samples: Sequence[Sample] | Sequence[Pair], part: float, seed: int) -> tuple[list[Numbered], list[Numbered]]:
    """Which samples are learned from and which are held out, the same each time. Each has its number, from 1."""
    numbered: list[Numbered] = list(enumerate(samples, 1))
    held_out = min(max(1, round(len(samples) * part)), len(samples) - 1) if part else 0
    order = list(range(1, len(samples) + 1))
    random.Random(seed).shuffle(order)  # noqa: S311 - the same split each time is the point
    chosen = set(order[:held_out])
    return [one for one in numbered if one[0] not in chosen], [one for one in numbered if one[0] in chosen]


def prepare(
    samples: Sequence[Numbered], tokenizer: Any, max_length: int, long_samples: Literal["refuse", "truncate", "skip"]
) -> Rows:
    done = Rows()
    for number, sample in samples:
        rows = [_pair(tokenizer, sample)] if isinstance(sample, Pair) else _chat(tokenizer, sample)
        longest = max(row.pop("length") for row in rows)
        if longest > max_length:
            if long_samples == "refuse":
                raise SampleTooLong(
                    f"Sample {number} has {longest} tokens, and the model reads {max_length} at once. Shorten it, set "
                    "another max_length, or choose long_samples: truncate or skip."
                )
            rows = [short for row in rows if (short := _shortened(row, tokenizer, max_length))]
            if long_samples == "skip" or not rows:
                done.skipped += 1
                continue
            done.truncated += 1
        done.rows += rows
        done.tokens += min(longest, max_length)
    return done


def _chat(tokenizer: Any, sample: Sample) -> list[Row]:
    document = sample.model_dump(exclude_none=True)
    return [
        {"input_ids": one.input_ids, "labels": one.labels, "length": len(one.input_ids)}
        for one in encode(tokenizer, document["messages"], document.get("tools"))
    ]


def _pair(tokenizer: Any, pair: Pair) -> Row:
    """As text: the trainer turns it into tokens itself, and adds the first token of all when the tokenizer has one."""
    document = pair.model_dump(exclude_none=True)
    tools = document.get("tools")
    prompt = render(tokenizer, document["messages"], tools, add_generation_prompt=True)
    answers = {
        name: render(tokenizer, document["messages"] + document[name], tools).removeprefix(prompt).rstrip()
        for name in ("chosen", "rejected")
    }
    if tokenizer.bos_token and tokenizer("")["input_ids"]:
        prompt = prompt.removeprefix(tokenizer.bos_token)
    longest = max(len(tokenizer(prompt + answer)["input_ids"]) for answer in answers.values())
    return {"prompt": prompt, **answers, "length": longest}


def _shortened(row: Row, tokenizer: Any, max_length: int) -> Row | None:
    """The beginning of it, if that holds anything to learn."""
    if "prompt" in row:  # the trainer shortens the answers itself
        return row if len(tokenizer(row["prompt"])["input_ids"]) < max_length else None
    short = {name: values[:max_length] for name, values in row.items()}
    return short if any(label != IGNORED for label in short["labels"][1:]) else None
