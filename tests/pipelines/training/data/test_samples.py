"""Parsing of a dataset's lines, and the errors with their line numbers."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.training.data import resolution
from pipelines.training.data.parsing import (
    EmptyData,
    InvalidSample,
    parse_samples,
    read_lines,
    read_samples,
    to_json_line,
)
from pipelines.training.data.samples import PreferencePair, Sample

QUESTION = {"role": "user", "content": "Find Alien."}
ANSWER = {"role": "assistant", "content": "Here it is."}
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
CALL = {
    "role": "assistant",
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "search", "arguments": '{"title": "Alien"}'}}],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "{}"}


def chat(*messages: Any, **fields: Any) -> str:
    return json.dumps({"messages": list(messages), **fields})


def call(name: str = "search", arguments: Any = "{}") -> dict[str, Any]:
    return {
        "role": "assistant",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def test_a_conversation_with_a_tool_call_is_parsed() -> None:
    (sample,) = parse_samples(chat(QUESTION, CALL, RESULT, ANSWER, tools=[TOOL]), "test")
    assert isinstance(sample, Sample)
    assert [message.role for message in sample.messages] == ["user", "assistant", "tool", "assistant"]
    assert sample.model_dump(exclude_none=True) == {"messages": [QUESTION, CALL, RESULT, ANSWER], "tools": [TOOL]}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be brief."}),
        ({**QUESTION, "content": [{"type": "text", "text": "Find "}, {"type": "text", "text": "Alien."}]}, QUESTION),
        ({**QUESTION, "weight": None}, QUESTION),
        ({**ANSWER, "weight": 1, "refusal": None, "audio": None, "tool_calls": [], "annotations": []}, ANSWER),
        (call(arguments={"title": "Alien"}), call(arguments='{"title":"Alien"}')),
    ],
)
def test_other_forms_of_a_message_are_normalized(message: dict[str, Any], expected: dict[str, Any]) -> None:
    (sample,) = parse_samples(chat(QUESTION, message, ANSWER, tools=[TOOL], parallel_tool_calls=False), "test")
    assert isinstance(sample, Sample)
    assert sample.messages[1].model_dump(exclude_none=True) == expected


@pytest.mark.parametrize(
    "line",
    [
        {"messages": [QUESTION], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "No."}]},
        {"messages": [QUESTION], "chosen": ANSWER, "rejected": "No."},
        {"prompt": "Find Alien.", "chosen": "Here it is.", "rejected": "No."},
        {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "No."}]},
        {
            "input": {"messages": [QUESTION], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [ANSWER],
            "non_preferred_output": [{**ANSWER, "content": "No."}],
        },
    ],
)
def test_all_forms_of_preferences_are_parsed_to_the_same_pair(line: dict[str, Any]) -> None:
    (pair,) = parse_samples(json.dumps(line), "test")
    expected = {"messages": [QUESTION], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "No."}]}
    assert isinstance(pair, PreferencePair)
    assert pair.model_dump(exclude_none=True) == expected


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not JSON"),
        ("null", "it is not an object"),
        ("[]", "it is not an object"),
        ('{"text": "a"}', "it has no messages"),
        ('{"messages": "a"}', "messages: "),
        (chat(), "messages: "),
        (chat(QUESTION), "no message of the assistant"),
        (chat(QUESTION, ANSWER, QUESTION), "its last message is the user's"),
        (chat(QUESTION, {"role": "assistant", "content": "  "}), "neither content nor tool_calls"),
        (chat({"role": "user", "content": ""}, ANSWER), "the user's message has no content"),
        (chat({"role": "user"}, ANSWER), "the user's message has no content"),
        (chat({"role": "bot", "content": "a"}, ANSWER), "messages.0.role"),
        (chat({**QUESTION, "tool_calls": CALL["tool_calls"]}, ANSWER, tools=[TOOL]), "only a message of the assistant"),
        (chat({**QUESTION, "tool_call_id": "c1"}, ANSWER), "tool_call_id"),
        (chat(QUESTION, {"role": "tool", "content": "{}"}, ANSWER), "tool_call_id"),
        (chat(QUESTION, RESULT, ANSWER), "answers"),
        (chat(QUESTION, CALL), "'search', which is not among its tools"),
        (chat(QUESTION, call("other"), tools=[TOOL]), "'other', which is not among its tools"),
        (chat(QUESTION, call(arguments="title=Alien"), tools=[TOOL]), "is not JSON"),
        (chat(QUESTION, call(arguments='["Alien"]'), tools=[TOOL]), "must be a JSON object"),
        (chat(QUESTION, ANSWER, tools=["search"]), "tools.0"),
        (chat(QUESTION, {**ANSWER, "weight": 0}), "remove the weight"),
        (chat(QUESTION, {**ANSWER, "mood": "good"}), "messages.1.mood"),
        (chat(QUESTION, ANSWER, source="a book"), "source"),
        (chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER), "only text"),
        (chat({"role": "user", "content": "a\0b"}, ANSWER), "U+0000"),
        (chat(QUESTION, call(arguments='{"title": "a\\u0000b"}'), tools=[TOOL]), "U+0000"),
        ('{"messages": "\\ud800"}', "is not JSON"),
        ('{"messages": ' + "[" * 200 + "]" * 200 + "}", "nested"),
        ('{"messages": ' + "[" * 100_000, "is not JSON"),
        ('{"prompt": "a", "chosen": "b"}', "rejected: "),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "nothing to prefer"),
        ('{"chosen": "b", "rejected": "c"}', "messages: "),
        ('{"input": "a", "preferred_output": [], "non_preferred_output": []}', "input is an object"),
        ('{"input": {"messages": [], "model": "x"}, "preferred_output": []}', "'model'"),
        (
            json.dumps({"messages": [QUESTION], "chosen": [QUESTION, ANSWER], "rejected": [ANSWER]}),
            "begin with the assistant's",
        ),
    ],
)
def test_the_error_of_an_invalid_line_has_its_number_and_reason(line: str, reason: str) -> None:
    good = chat(QUESTION, ANSWER)
    with pytest.raises(InvalidSample) as refused:
        parse_samples(f"{good}\n\n{line}\n{good}\n", "my-set")
    assert "line 3 of my-set" in refused.value.message
    assert reason in refused.value.message


def test_bytes_that_are_not_utf_8_are_refused() -> None:
    with pytest.raises(InvalidSample, match="line 1 of test is not JSON"):
        parse_samples(b'{"messages": "\xff"}', "test")


def test_a_dataset_has_samples_of_one_kind() -> None:
    pair = '{"prompt": "a", "chosen": "b", "rejected": "c"}'
    with pytest.raises(InvalidSample, match="line 2 of test is preferences, those before are chat"):
        parse_samples([chat(QUESTION, ANSWER), pair], "test")


@pytest.mark.parametrize("text", ["", "\n \n", b"", []])
def test_data_without_samples_is_refused(text: Any) -> None:
    with pytest.raises(EmptyData, match="no sample in test"):
        parse_samples(text, "test")


def test_unicode_line_separators_do_not_end_a_line() -> None:
    text = "one\u2028two\x85three\x0bfour"
    line = json.dumps({"messages": [{**QUESTION, "content": text}, ANSWER]}, ensure_ascii=False)
    line = line.replace("\x0b", "\\u000b")
    (sample,) = parse_samples(f"\ufeff{line}\r\n", "test")
    assert isinstance(sample, Sample)
    assert sample.messages[0].content == text
    assert parse_samples(to_json_line(sample), "test") == [sample]


def test_samples_are_read_lazily() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield chat(QUESTION, ANSWER)

    reading = read_samples(endless(), "test")
    assert next(reading) == next(reading)


def test_the_length_of_a_line_is_limited(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.training.data.parsing.MAX_LINE_BYTES", 1000)
    path = tmp_path / "long"
    path.write_bytes(b" " * 10_000 + b"{}")
    with path.open("rb") as file:
        assert max(len(line) for line in read_lines(file)) == 1001
    path.write_bytes(b"[" + b" " * 10_000)
    with path.open("rb") as file, pytest.raises(InvalidSample, match="line 1 of test has more than 1000 bytes"):
        parse_samples(read_lines(file), "test")


def test_the_shipped_samples_are_valid() -> None:
    samples = resolution.demo_samples()
    calls = [sample for sample in samples if any(message.tool_calls for message in sample.messages)]
    assert len(samples) >= 40
    assert len(calls) >= 10
    assert len({sample.messages[1].content for sample in samples}) == len(samples)
    assert len({sample.messages[0].content for sample in samples}) == 1
