"""Turn conversations into tokens, and mark the tokens of the assistant's answers as those to learn.

The chat template of the model renders a conversation. When the model is served, the template writes all text around an
answer, so only the answer itself, with the token that ends it, is learned and measured.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import UnprocessableRequest

IGNORED = -100
"""The label of a token that is read but not learned."""


class UnusableTokenizer(UnprocessableRequest):
    """The tokenizer of the base model cannot be used for training on conversations."""

    code = "UNUSABLE_TOKENIZER"


@dataclass(frozen=True)
class Encoding:
    input_ids: list[int]
    labels: list[int]

    @property
    def learned_tokens(self) -> int:
        """The number of tokens that are learned. The first token is never predicted, so it does not count."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
) -> list[Encoding]:
    """Encode a conversation for training, usually as one encoding.

    Some templates render an earlier answer differently when another one follows: they drop its reasoning. Then each
    answer becomes an encoding of its own, in the form in which it will be generated.
    """
    rendered_turns = turns(tokenizer, messages, tools)
    full_text = rendered_turns[-1][0] + rendered_turns[-1][1]
    if all(full_text.startswith(before + answer) for before, answer in rendered_turns):
        return [
            _tokenize(tokenizer, full_text, [(len(before), len(before + answer)) for before, answer in rendered_turns])
        ]
    return [
        _tokenize(tokenizer, before + answer, [(len(before), len(before + answer))])
        for before, answer in rendered_turns
    ]


def turns(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
) -> list[tuple[str, str]]:
    """For each answer of the assistant: the text before it, and the answer with the token that ends it."""
    return [_render_turn(tokenizer, messages, number, tools) for number in _answer_positions(messages)]


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, **options: Any) -> str:
    """Render a conversation as text, with the chat template of the tokenizer."""
    if not tokenizer.chat_template:
        raise UnusableTokenizer(
            f"{tokenizer.name_or_path} has no chat template. Use its instruct or chat variant, or a folder with a "
            "chat_template.jinja."
        )
    template_messages = [_to_template_message(message) for message in messages]
    return tokenizer.apply_chat_template(
        template_messages, tools=list(tools) if tools else None, tokenize=False, **options
    )


def _answer_positions(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _render_turn(tokenizer: Any, messages: Sequence[Mapping[str, Any]], number: int, tools: Any) -> tuple[str, str]:
    """The text before this answer, and the answer with the token that ends it."""
    before = render(tokenizer, messages[:number], tools, add_generation_prompt=True)
    after = render(tokenizer, messages[: number + 1], tools)
    if not after.startswith(before):
        raise UnusableTokenizer(
            f"The chat template of {tokenizer.name_or_path} renders the beginning of an answer differently in a prompt "
            "and in a complete conversation, so the model cannot be trained on answers alone."
        )
    answer = after[len(before) :]
    eos = tokenizer.eos_token
    if eos and eos in answer:
        answer = answer[: answer.rindex(eos) + len(eos)]
    return before, answer


def _tokenize(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> Encoding:
    if not tokenizer.is_fast:
        raise UnusableTokenizer(f"{tokenizer.name_or_path} has only a slow tokenizer; a fast one is needed.")
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = tokens["input_ids"]
    is_learned = [any(first <= start < end <= last for first, last in spans) for start, end in tokens["offset_mapping"]]
    return Encoding(ids, [token if learned else IGNORED for token, learned in zip(ids, is_learned, strict=True)])


def _to_template_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Templates expect arguments as an object, and content as text even if there is none."""
    prepared = {**message, "content": message.get("content") or ""}
    if calls := message.get("tool_calls"):
        prepared["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _arguments(call["function"]["arguments"])}}
            for call in calls
        ]
    else:
        prepared.pop("tool_calls", None)
    return prepared


def _arguments(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments
