"""How good a model is on conversations that it has not seen: its loss, its answers, and how its GGUF differs from it.

Everything is measured on the assistant's tokens only, and nothing is estimated. A Measured is plain JSON, so that what
has been measured can be kept and gone on from.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypedDict

from pipelines.training.data.samples import Sample
from pipelines.training.fine_tune.tokenize import IGNORED, Encoding, encode, render
from pipelines.training.validate.gguf_model import GgufModel

BATCH = 8
"""How many answers are generated together."""

Measured = dict[str, Any]
"""Of one sample: the summed loss and number of its tokens, and its answers. Of a GGUF also how it differs."""


class Interrupted(Exception):
    """A measurement was given up, because its job should stop."""


class Score(TypedDict):
    exact: bool
    rouge_l: float
    rouge_1: float


@dataclass(frozen=True)
class Question:
    """What the model reads before one of the assistant's answers, and that answer."""

    prompt: str
    prompt_ids: list[int]
    expected: str


@dataclass(frozen=True)
class Prepared:
    encodings: list[Encoding]
    questions: list[Question]


def prepare(tokenizer: Any, sample: Sample, context: int) -> Prepared:
    """A sample as a model reads it; what is beyond the model's context is left out."""
    document = sample.model_dump(exclude_none=True)
    messages, tools = document["messages"], document.get("tools")
    encodings = encode(tokenizer, messages, tools)
    answers = [answer for encoding in encodings for answer in _answers(tokenizer, encoding)]
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    questions: list[Question] = []
    for number, expected in zip(turns, answers, strict=True):
        prompt = render(tokenizer, messages[:number], tools, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if len(prompt_ids) < context:
            questions.append(Question(prompt, prompt_ids, expected))
    short = [Encoding(one.input_ids[:context], one.labels[:context]) for one in encodings]
    return Prepared([one for one in short if one.learned], questions)


def measure(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Prepared],
    *,
    context: int,
    max_new_tokens: int,
    should_stop: Callable[[], bool],
) -> list[Measured]:
    """Measure a transformers model on some samples, whose answers are generated together."""
    measured = [_losses(model, sample) for sample in samples]
    if should_stop():
        raise Interrupted
    questions = [question for sample in samples for question in sample.questions]
    answers = _generate(model, tokenizer, questions, context, max_new_tokens, should_stop)
    for sample, one in zip(samples, measured, strict=True):
        one["answers"] = [next(answers) for _ in sample.questions]
    return measured


def compare(
    model: Any,
    exported: GgufModel,
    tokenizer: Any,
    sample: Prepared,
    *,
    max_new_tokens: int,
    should_stop: Callable[[], bool],
) -> Measured:
    """Measure a GGUF on a sample, beside the transformers model that it was made from."""
    loss = divergence = 0.0
    tokens = agreed = 0
    for encoding in sample.encodings:
        positions = _positions(encoding)
        trained = _log_probabilities(model, encoding, positions)
        own = _normal(exported.logits(encoding.input_ids, positions), trained)
        targets = _targets(encoding, positions, trained)
        loss -= own.gather(1, targets).sum().item()
        divergence += (trained.exp() * (trained - own)).sum().item()
        agreed += int((trained.argmax(-1) == own.argmax(-1)).sum().item())
        tokens += len(positions)
    answers: list[str] = []
    same = 0
    for question in sample.questions:
        ids = exported.tokenize(question.prompt)
        same += ids == question.prompt_ids
        said = exported.generate(ids, max_new_tokens, should_stop)
        if said is None:
            raise Interrupted
        answers.append(tokenizer.decode(_until_end(said, tokenizer), clean_up_tokenization_spaces=False))
    return {"loss": loss, "tokens": tokens, "agreed": agreed, "kl": divergence, "same": same, "answers": answers}


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def score(answer: str, expected: str) -> Score:
    said, wanted = answer.strip(), expected.strip()
    words, wanted_words = said.lower().split(), wanted.lower().split()
    return {
        "exact": said == wanted,
        "rouge_l": _f_measure(_longest_common(words, wanted_words), len(words), len(wanted_words)),
        "rouge_1": _f_measure(_common(words, wanted_words), len(words), len(wanted_words)),
    }


def _answers(tokenizer: Any, encoding: Encoding) -> Iterator[str]:
    """The stretches that are learned, as text without the token that ends them."""
    for learned, stretch in groupby(encoding.labels, lambda label: label != IGNORED):
        if learned:
            yield tokenizer.decode(_until_end(list(stretch), tokenizer), clean_up_tokenization_spaces=False)


def _until_end(ids: list[int], tokenizer: Any) -> list[int]:
    return ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids


def _losses(model: Any, sample: Prepared) -> Measured:
    loss, tokens = 0.0, 0
    for encoding in sample.encodings:
        positions = _positions(encoding)
        told = _log_probabilities(model, encoding, positions)
        loss -= told.gather(1, _targets(encoding, positions, told)).sum().item()
        tokens += len(positions)
    return {"loss": loss, "tokens": tokens}


def _positions(encoding: Encoding) -> list[int]:
    """Where a learned token is predicted: one before it."""
    return [number - 1 for number, label in enumerate(encoding.labels) if label != IGNORED and number > 0]


def _targets(encoding: Encoding, positions: Sequence[int], like: Any) -> Any:
    import torch

    return torch.tensor([[encoding.input_ids[position + 1]] for position in positions], device=like.device)


def _log_probabilities(model: Any, encoding: Encoding, positions: Sequence[int]) -> Any:
    """At these positions, of every token: a matrix."""
    import torch

    ids = torch.tensor([encoding.input_ids], device=model.device)
    wanted = torch.tensor(positions, device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=wanted).logits[0]
        return logits.float().log_softmax(-1)


def _normal(logits: Any, like: Any) -> Any:
    import torch

    # A GGUF's vocabulary may be padded.
    return torch.from_numpy(logits).to(like.device)[:, : like.shape[1]].log_softmax(-1)


def _generate(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    context: int,
    max_new_tokens: int,
    should_stop: Callable[[], bool],
) -> Iterator[str]:
    """The likeliest answers, in the order of the questions. Those of about the same length are generated together."""
    order = sorted(range(len(questions)), key=lambda number: len(questions[number].prompt_ids))
    answers: dict[int, str] = {}
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        prompts = [questions[number].prompt_ids for number in batch]
        longest = min(max_new_tokens, context - len(prompts[-1]))
        for number, ids in zip(batch, _continue(model, tokenizer, prompts, longest, should_stop), strict=True):
            answers[number] = tokenizer.decode(_until_end(ids, tokenizer), clean_up_tokenization_spaces=False)
    return iter([answers[number] for number in range(len(questions))])


def _continue(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], longest: int, should_stop: Callable[[], bool]
) -> list[list[int]]:
    import torch
    from transformers import GenerationConfig

    def interrupt(ids: Any, scores: Any) -> Any:
        if should_stop():
            raise Interrupted
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    width = max(len(prompt) for prompt in prompts)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = [[padding] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    greedy = GenerationConfig(
        max_new_tokens=longest, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=padding
    )
    with torch.inference_mode():
        done = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=greedy,
            stopping_criteria=[interrupt],
        )
    return done[:, width:].tolist()


def _f_measure(common: int, said: int, wanted: int) -> float:
    return 2 * common / (said + wanted) if common else float(said == wanted == 0)


def _common(said: Sequence[str], wanted: Sequence[str]) -> int:
    return sum(min(said.count(word), wanted.count(word)) for word in set(said))


def _longest_common(said: Sequence[str], wanted: Sequence[str]) -> int:
    """The length of the longest sequence of words that both have in this order."""
    row = [0] * (len(wanted) + 1)
    for word in said:
        before = 0
        for number, other in enumerate(wanted, 1):
            before, row[number] = row[number], before + 1 if word == other else max(row[number], row[number - 1])
    return row[-1]


def total(measured: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(one[name] for one in measured)
