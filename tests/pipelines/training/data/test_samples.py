"""Lines of a dataset: what is understood, and what is refused with the line's number."""

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

ASK = {"role": "user", "content": "Find Alien."}
SAY = {"role": "assistant", "content": "Here it is."}
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


def test_a_conversation_with_a_call_and_its_result() -> None:
    (sample,) = parse_samples(chat(ASK, CALL, RESULT, SAY, tools=[TOOL]), "test")
    assert isinstance(sample, Sample)
    assert [message.role for message in sample.messages] == ["user", "assistant", "tool", "assistant"]
    assert sample.model_dump(exclude_none=True) == {"messages": [ASK, CALL, RESULT, SAY], "tools": [TOOL]}


@pytest.mark.parametrize(
    ("told", "meant"),
    [
        ({"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be brief."}),
        ({**ASK, "content": [{"type": "text", "text": "Find "}, {"type": "text", "text": "Alien."}]}, ASK),
        ({**ASK, "weight": None}, ASK),
        ({**SAY, "weight": 1, "refusal": None, "audio": None, "tool_calls": [], "annotations": []}, SAY),
        (call(arguments={"title": "Alien"}), call(arguments='{"title":"Alien"}')),
    ],
)
def test_what_others_write_differently(told: dict[str, Any], meant: dict[str, Any]) -> None:
    (sample,) = parse_samples(chat(ASK, told, SAY, tools=[TOOL], parallel_tool_calls=False), "test")
    assert isinstance(sample, Sample)
    assert sample.messages[1].model_dump(exclude_none=True) == meant


@pytest.mark.parametrize(
    "line",
    [
        {"messages": [ASK], "chosen": [SAY], "rejected": [{**SAY, "content": "No."}]},
        {"messages": [ASK], "chosen": SAY, "rejected": "No."},
        {"prompt": "Find Alien.", "chosen": "Here it is.", "rejected": "No."},
        {"prompt": [ASK], "chosen": [SAY], "rejected": [{**SAY, "content": "No."}]},
        {
            "input": {"messages": [ASK], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [SAY],
            "non_preferred_output": [{**SAY, "content": "No."}],
        },
    ],
)
def test_preferences_in_every_form_are_the_same(line: dict[str, Any]) -> None:
    (pair,) = parse_samples(json.dumps(line), "test")
    expected = {"messages": [ASK], "chosen": [SAY], "rejected": [{**SAY, "content": "No."}]}
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
        (chat(ASK), "no message of the assistant"),
        (chat(ASK, SAY, ASK), "its last message is the user's"),
        (chat(ASK, {"role": "assistant", "content": "  "}), "neither content nor tool_calls"),
        (chat({"role": "user", "content": ""}, SAY), "the user's message has no content"),
        (chat({"role": "user"}, SAY), "the user's message has no content"),
        (chat({"role": "bot", "content": "a"}, SAY), "messages.0.role"),
        (chat({**ASK, "tool_calls": CALL["tool_calls"]}, SAY, tools=[TOOL]), "only a message of the assistant"),
        (chat({**ASK, "tool_call_id": "c1"}, SAY), "tool_call_id"),
        (chat(ASK, {"role": "tool", "content": "{}"}, SAY), "tool_call_id"),
        (chat(ASK, RESULT, SAY), "answers"),
        (chat(ASK, CALL), "'search', which is not among its tools"),
        (chat(ASK, call("other"), tools=[TOOL]), "'other', which is not among its tools"),
        (chat(ASK, call(arguments="title=Alien"), tools=[TOOL]), "is not JSON"),
        (chat(ASK, call(arguments='["Alien"]'), tools=[TOOL]), "must be a JSON object"),
        (chat(ASK, SAY, tools=["search"]), "tools.0"),
        (chat(ASK, {**SAY, "weight": 0}), "remove the weight"),
        (chat(ASK, {**SAY, "mood": "good"}), "messages.1.mood"),
        (chat(ASK, SAY, source="a book"), "source"),
        (chat({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, SAY), "only text"),
        (chat({"role": "user", "content": "a\0b"}, SAY), "U+0000"),
        (chat(ASK, call(arguments='{"title": "a\\u0000b"}'), tools=[TOOL]), "U+0000"),
        ('{"messages": "\\ud800"}', "is not JSON"),
        ('{"messages": ' + "[" * 200 + "]" * 200 + "}", "nested"),
        ('{"messages": ' + "[" * 100_000, "is not JSON"),
        ('{"prompt": "a", "chosen": "b"}', "rejected: "),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "nothing to prefer"),
        ('{"chosen": "b", "rejected": "c"}', "messages: "),
        ('{"input": "a", "preferred_output": [], "non_preferred_output": []}', "input is an object"),
        ('{"input": {"messages": [], "model": "x"}, "preferred_output": []}', "'model'"),
        (json.dumps({"messages": [ASK], "chosen": [ASK, SAY], "rejected": [SAY]}), "begin with the assistant's"),
    ],
)
def test_a_bad_line_is_named(line: str, reason: str) -> None:
    good = chat(ASK, SAY)
    with pytest.raises(InvalidSample) as refused:
        parse_samples(f"{good}\n\n{line}\n{good}\n", "my-set")
    assert "line 3 of my-set" in refused.value.message
    assert reason in refused.value.message


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(InvalidSample, match="line 1 of test is not JSON"):
        parse_samples(b'{"messages": "\xff"}', "test")


def test_one_set_has_one_sort() -> None:
    pair = '{"prompt": "a", "chosen": "b", "rejected": "c"}'
    with pytest.raises(InvalidSample, match="line 2 of test is preferences, those before are chat"):
        parse_samples([chat(ASK, SAY), pair], "test")


@pytest.mark.parametrize("text", ["", "\n \n", b"", []])
def test_nothing_is_an_error(text: Any) -> None:
    with pytest.raises(EmptyData, match="no sample in test"):
        parse_samples(text, "test")


def test_what_looks_like_the_end_of_a_line_is_text() -> None:
    said = "one\u2028two\x85three\x0bfour"
    line = json.dumps({"messages": [{**ASK, "content": said}, SAY]}, ensure_ascii=False)
    line = line.replace("\x0b", "\\u000b")
    (sample,) = parse_samples(f"\ufeff{line}\r\n", "test")
    assert isinstance(sample, Sample)
    assert sample.messages[0].content == said
    assert parse_samples(to_json_line(sample), "test") == [sample]


def test_samples_are_read_one_by_one() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield chat(ASK, SAY)

    reading = read_samples(endless(), "test")
    assert next(reading) == next(reading)


def test_a_line_without_end_is_not_read_to_its_end(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.training.data.parsing.MAX_LINE_BYTES", 1000)
    path = tmp_path / "long"
    path.write_bytes(b" " * 10_000 + b"{}")
    with path.open("rb") as file:
        assert max(len(line) for line in read_lines(file)) == 1001
    path.write_bytes(b"[" + b" " * 10_000)
    with path.open("rb") as file, pytest.raises(InvalidSample, match="line 1 of test has more than 1000 bytes"):
        parse_samples(read_lines(file), "test")


def test_the_samples_that_ship() -> None:
    samples = resolution.demo_samples()
    calls = [sample for sample in samples if any(message.tool_calls for message in sample.messages)]
    assert len(samples) >= 40
    assert len(calls) >= 10
    assert len({sample.messages[1].content for sample in samples}) == len(samples)
    assert len({sample.messages[0].content for sample in samples}) == 1
