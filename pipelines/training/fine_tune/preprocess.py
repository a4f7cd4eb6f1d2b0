"""Turn samples into the rows that a trainer reads: split off the held-out samples, tokenize, limit the length."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jinja2 import TemplateError

from cluster.errors import UnprocessableRequest
from pipelines.training.data.parsing import WrongKindOfData
from pipelines.training.data.samples import PreferencePair, Sample
from pipelines.training.fine_tune.tokenize import IGNORED, UnusableTokenizer, encode, render

HELD_OUT_FILE = "held_out.jsonl"
"""The file beside a trained model that has the held-out samples of its training."""
NO_LIMIT = 1_000_000
"""Tokenizers without a limit report a number above this."""

Row = dict[str, Any]
NumberedSample = tuple[int, Sample | PreferencePair]


class SampleTooLong(UnprocessableRequest):
    """A sample is longer than the model's context."""

    code = "SAMPLE_TOO_LONG"


class LengthBeyondContext(UnprocessableRequest):
    """max_length is more than the model's context."""

    code = "LENGTH_BEYOND_CONTEXT"


class NothingToTrain(UnprocessableRequest):
    """No sample is left to train on."""

    code = "NOTHING_TO_TRAIN"


@dataclass
class PreparedRows:
    rows: list[Row] = field(default_factory=list[Row])
    tokens: int = 0
    samples: int = 0  # that the rows were made from
    truncated: int = 0
    skipped: int = 0


def require_kind(samples: Sequence[Sample] | Sequence[PreferencePair], method: Literal["supervised", "dpo"]) -> None:
    if not samples:
        return
    is_pairs = any(isinstance(sample, PreferencePair) for sample in samples)
    if method == "dpo" and not is_pairs:
        raise WrongKindOfData(
            "method: dpo needs preference pairs, and this data is conversations: give each line chosen and rejected, "
            "or use method: supervised."
        )
    if method == "supervised" and is_pairs:
        raise WrongKindOfData(
            "method: supervised needs conversations, and this data is preference pairs: use method: dpo, or data "
            "without chosen and rejected."
        )


def context_length(base: str, tokenizer: Any) -> int:
    """The length of the model's context, in tokens."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base).get_text_config()
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None), NO_LIMIT]
    return min(limit for limit in limits if limit)


def resolve_max_length(requested: int | None, context: int) -> int:
    """The maximum length of a sample: the requested one, or else the model's context."""
    if requested is not None and requested > context:
        raise LengthBeyondContext(
            f"max_length is {requested}, and the model's context is {context} tokens: use {context} or less."
        )
    return requested or context


def split(
    samples: Sequence[Sample] | Sequence[PreferencePair], share: float, seed: int
) -> tuple[list[NumberedSample], list[NumberedSample]]:
    """Split samples into those to train on and those to hold out, always the same. Each has its number, from 1."""
    numbered: list[NumberedSample] = list(enumerate(samples, 1))
    held_out = min(max(1, round(len(samples) * share)), len(samples) - 1) if share else 0
    order = list(range(1, len(samples) + 1))
    random.Random(seed).shuffle(order)  # noqa: S311 - the split must be reproducible
    held_out_numbers = set(order[:held_out])
    return [item for item in numbered if item[0] not in held_out_numbers], [
        item for item in numbered if item[0] in held_out_numbers
    ]


def prepare(
    samples: Sequence[NumberedSample],
    tokenizer: Any,
    max_length: int,
    long_samples: Literal["refuse", "truncate", "skip"],
) -> PreparedRows:
    prepared = PreparedRows()
    for number, sample in samples:
        try:
            rows = (
                [_pair_row(tokenizer, sample)] if isinstance(sample, PreferencePair) else _chat_rows(tokenizer, sample)
            )
        except TemplateError as error:
            raise UnusableTokenizer(
                f"The chat template of {tokenizer.name_or_path} refuses sample {number}: {error}. Change the sample, "
                "or use another base model."
            ) from error
        longest = max(row.pop("length") for row in rows)
        if longest > max_length:
            if long_samples == "refuse":
                raise SampleTooLong(
                    f"Sample {number} has {longest} tokens, and {max_length} are allowed. Shorten it, set another "
                    "max_length, or choose long_samples: truncate or skip."
                )
            rows = [short for row in rows if (short := _truncate(row, tokenizer, max_length))]
            if long_samples == "skip" or not rows:
                prepared.skipped += 1
                continue
            prepared.truncated += 1
        prepared.rows += rows
        prepared.samples += 1
        prepared.tokens += min(longest, max_length)
    return prepared


def _chat_rows(tokenizer: Any, sample: Sample) -> list[Row]:
    document = sample.model_dump(exclude_none=True)
    return [
        {"input_ids": encoding.input_ids, "labels": encoding.labels, "length": len(encoding.input_ids)}
        for encoding in encode(tokenizer, document["messages"], document.get("tools"))
    ]


def _pair_row(tokenizer: Any, pair: PreferencePair) -> Row:
    """A row of text: TRL tokenizes pairs itself, and adds the BOS token if the tokenizer has one."""
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


def _truncate(row: Row, tokenizer: Any, max_length: int) -> Row | None:
    """The row cut to `max_length`, or None if no token to train on is left."""
    if "prompt" in row:  # the trainer shortens the answers itself
        return row if len(tokenizer(row["prompt"])["input_ids"]) < max_length else None
    short = {name: values[:max_length] for name, values in row.items()}
    return short if any(label != IGNORED for label in short["labels"][1:]) else None
