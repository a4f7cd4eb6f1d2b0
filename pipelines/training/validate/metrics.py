"""Measure a model on held-out conversations: its loss, its answers, and how its GGUF differs from it.

Only the tokens of the assistant's answers are measured. SampleMetrics is plain JSON, so that it can be stored, and a
later attempt can continue.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypedDict

from pipelines.training.data.samples import Sample
from pipelines.training.fine_tune.tokenize import IGNORED, Encoding, encode, render
from pipelines.training.validate.gguf_model import GgufModel

GENERATION_BATCH_SIZE = 8
"""The number of answers that are generated together."""

SampleMetrics = dict[str, Any]
"""Of one sample: the sum of its tokens' losses, their number, and the answers. For a GGUF also the differences."""


class MeasurementInterrupted(Exception):
    """A measurement was aborted, because its job should stop."""


class Score(TypedDict):
    exact: bool
    rouge_l: float
    rouge_1: float


@dataclass(frozen=True)
class Question:
    """The prompt of one of the assistant's answers, and that answer."""

    prompt: str
    prompt_ids: list[int]
    expected: str


@dataclass(frozen=True)
class PreparedSample:
    encodings: list[Encoding]
    questions: list[Question]


def prepare(tokenizer: Any, sample: Sample, context: int) -> PreparedSample:
    """Tokenize a sample. What exceeds the model's context is left out."""
    document = sample.model_dump(exclude_none=True)
    messages, tools = document["messages"], document.get("tools")
    encodings = encode(tokenizer, messages, tools)
    answers = [answer for encoding in encodings for answer in _expected_answers(tokenizer, encoding)]
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    questions: list[Question] = []
    for number, expected in zip(turns, answers, strict=True):
        prompt = render(tokenizer, messages[:number], tools, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if len(prompt_ids) < context:
            questions.append(Question(prompt, prompt_ids, expected))
    truncated = [Encoding(item.input_ids[:context], item.labels[:context]) for item in encodings]
    return PreparedSample([item for item in truncated if item.learned_tokens], questions)


def measure(
    model: Any,
    tokenizer: Any,
    samples: Sequence[PreparedSample],
    *,
    context: int,
    max_new_tokens: int,
    should_stop: Callable[[], bool],
) -> list[SampleMetrics]:
    """Measure a transformers model on some samples. Answers are generated in batches."""
    measured = [_measure_loss(model, sample) for sample in samples]
    if should_stop():
        raise MeasurementInterrupted
    questions = [question for sample in samples for question in sample.questions]
    answers = _generate(model, tokenizer, questions, context, max_new_tokens, should_stop)
    for sample, metrics in zip(samples, measured, strict=True):
        metrics["answers"] = [next(answers) for _ in sample.questions]
    return measured


def compare(
    model: Any,
    exported: GgufModel,
    tokenizer: Any,
    sample: PreparedSample,
    *,
    max_new_tokens: int,
    should_stop: Callable[[], bool],
) -> SampleMetrics:
    """Measure a GGUF on a sample, and compare it with the transformers model that it was made from."""
    loss = divergence = 0.0
    tokens = agreed = 0
    for encoding in sample.encodings:
        positions = _predicting_positions(encoding)
        log_probs = _log_probabilities(model, encoding, positions)
        gguf_log_probs = _to_log_probabilities(exported.logits(encoding.input_ids, positions), log_probs)
        targets = _targets(encoding, positions, log_probs)
        loss -= gguf_log_probs.gather(1, targets).sum().item()
        divergence += (log_probs.exp() * (log_probs - gguf_log_probs)).sum().item()
        agreed += int((log_probs.argmax(-1) == gguf_log_probs.argmax(-1)).sum().item())
        tokens += len(positions)
    answers: list[str] = []
    same_prompts = 0
    for question in sample.questions:
        ids = exported.tokenize(question.prompt)
        same_prompts += ids == question.prompt_ids
        generated = exported.generate(ids, max_new_tokens, should_stop)
        if generated is None:
            raise MeasurementInterrupted
        answers.append(tokenizer.decode(_before_eos(generated, tokenizer), clean_up_tokenization_spaces=False))
    return {
        "loss": loss,
        "tokens": tokens,
        "agreed": agreed,
        "kl": divergence,
        "same": same_prompts,
        "answers": answers,
    }


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def score(answer: str, expected: str) -> Score:
    actual, target = answer.strip(), expected.strip()
    actual_words, target_words = actual.lower().split(), target.lower().split()
    return {
        "exact": actual == target,
        "rouge_l": _f_measure(
            _longest_common_subsequence(actual_words, target_words), len(actual_words), len(target_words)
        ),
        "rouge_1": _f_measure(_common_words(actual_words, target_words), len(actual_words), len(target_words)),
    }


def _expected_answers(tokenizer: Any, encoding: Encoding) -> Iterator[str]:
    """The answers that are learned, as text without the token that ends them."""
    for learned, group in groupby(encoding.labels, lambda label: label != IGNORED):
        if learned:
            yield tokenizer.decode(_before_eos(list(group), tokenizer), clean_up_tokenization_spaces=False)


def _before_eos(ids: list[int], tokenizer: Any) -> list[int]:
    return ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids


def _measure_loss(model: Any, sample: PreparedSample) -> SampleMetrics:
    loss, tokens = 0.0, 0
    for encoding in sample.encodings:
        positions = _predicting_positions(encoding)
        log_probs = _log_probabilities(model, encoding, positions)
        loss -= log_probs.gather(1, _targets(encoding, positions, log_probs)).sum().item()
        tokens += len(positions)
    return {"loss": loss, "tokens": tokens}


def _predicting_positions(encoding: Encoding) -> list[int]:
    """The positions that predict learned tokens: one before each."""
    return [number - 1 for number, label in enumerate(encoding.labels) if label != IGNORED and number > 0]


def _targets(encoding: Encoding, positions: Sequence[int], reference: Any) -> Any:
    import torch

    return torch.tensor([[encoding.input_ids[position + 1]] for position in positions], device=reference.device)


def _log_probabilities(model: Any, encoding: Encoding, positions: Sequence[int]) -> Any:
    """The log probabilities of all tokens at these positions, as a matrix."""
    import torch

    ids = torch.tensor([encoding.input_ids], device=model.device)
    logits_to_keep = torch.tensor(positions, device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=logits_to_keep).logits[0]
        return logits.float().log_softmax(-1)


def _to_log_probabilities(logits: Any, reference: Any) -> Any:
    import torch

    # A GGUF's vocabulary may be padded.
    return torch.from_numpy(logits).to(reference.device)[:, : reference.shape[1]].log_softmax(-1)


def _generate(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    context: int,
    max_new_tokens: int,
    should_stop: Callable[[], bool],
) -> Iterator[str]:
    """Answers by greedy decoding, in the order of the questions. Prompts of similar length are batched."""
    order = sorted(range(len(questions)), key=lambda number: len(questions[number].prompt_ids))
    answers: dict[int, str] = {}
    for start in range(0, len(order), GENERATION_BATCH_SIZE):
        batch = order[start : start + GENERATION_BATCH_SIZE]
        prompts = [questions[number].prompt_ids for number in batch]
        max_tokens = min(max_new_tokens, context - len(prompts[-1]))
        for number, ids in zip(batch, _generate_batch(model, tokenizer, prompts, max_tokens, should_stop), strict=True):
            answers[number] = tokenizer.decode(_before_eos(ids, tokenizer), clean_up_tokenization_spaces=False)
    return iter([answers[number] for number in range(len(questions))])


def _generate_batch(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_tokens: int, should_stop: Callable[[], bool]
) -> list[list[int]]:
    import torch
    from transformers import GenerationConfig

    def stop_criterion(ids: Any, scores: Any) -> Any:
        if should_stop():
            raise MeasurementInterrupted
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    width = max(len(prompt) for prompt in prompts)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = [[padding] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    greedy = GenerationConfig(
        max_new_tokens=max_tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=padding
    )
    with torch.inference_mode():
        output = model.generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=greedy,
            stopping_criteria=[stop_criterion],
        )
    return output[:, width:].tolist()


def _f_measure(common: int, answer_length: int, expected_length: int) -> float:
    return 2 * common / (answer_length + expected_length) if common else float(answer_length == expected_length == 0)


def _common_words(words: Sequence[str], expected: Sequence[str]) -> int:
    return sum(min(words.count(word), expected.count(word)) for word in set(words))


def _longest_common_subsequence(words: Sequence[str], expected: Sequence[str]) -> int:
    """The length of the longest common subsequence of words."""
    row = [0] * (len(expected) + 1)
    for word in words:
        diagonal = 0
        for number, other in enumerate(expected, 1):
            diagonal, row[number] = row[number], diagonal + 1 if word == other else max(row[number], row[number - 1])
    return row[-1]


def sum_of(measured: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(one[name] for one in measured)
