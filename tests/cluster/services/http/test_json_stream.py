"""Lists that are parsed object by object, from chunks of any length."""

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.services.http import json_stream
from cluster.services.http.json_stream import JsonListParser, NotAnObjectList

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(max_size=8)
    | st.sampled_from(['"]}', "\\", "[{"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
LISTS = st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=3), max_size=5)


def parse(text: bytes, length: int) -> list[dict[str, Any]]:
    parser = JsonListParser()
    items = [item for begin in range(0, len(text), length) for item in parser.feed(text[begin : begin + length])]
    if not parser.is_complete:
        raise NotAnObjectList("it has no end")
    return items


@given(LISTS, st.integers(1, 40), st.sampled_from([None, 2]), st.booleans())
def test_a_list_equals_what_json_parses_for_any_chunk_length(
    objects: list[dict[str, Any]], length: int, indent: int | None, ascii_only: bool
) -> None:
    assert parse(json.dumps(objects, indent=indent, ensure_ascii=ascii_only).encode(), length) == objects


@given(st.binary(max_size=30) | st.text('[]{},:"\\ 1a', max_size=14).map(str.encode), st.integers(1, 5))
def test_only_lists_of_objects_are_accepted(text: bytes, length: int) -> None:
    try:
        expected: Any = json.loads(text)
    except ValueError:
        expected = None
    if isinstance(expected, list) and all(isinstance(item, dict) for item in expected):
        assert parse(text, length) == expected
    else:
        with pytest.raises(NotAnObjectList):
            parse(text, length)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"null",
        b"[1]",
        b"[[]]",
        b"[{}",
        b"[{},]",
        b"[,{}]",
        b"[{} {}]",
        b"[{}]]",
        b"[{}] x",
        b"[{}][",
        b"[{]}]",
        b'[{"a"}]',
        b'[{"a": "\\"}]',
        b"[]]",
        b"}",
        b"[" * 100_000,
        b"[" + b'{"a":[' * 100_000,
    ],
)
@pytest.mark.parametrize("length", [1, 2, 1000])
def test_invalid_lists_are_refused(text: bytes, length: int) -> None:
    with pytest.raises(NotAnObjectList):
        parse(text, length if len(text) < 1000 else 1000)


@pytest.mark.parametrize(
    ("start", "repeated"), [(b'[{"a":"', b"x"), (b"[", b" "), (b"[{}", b","), (b'[{"a":[{}', b",{}"), (b"[", b"\t\n")]
)
def test_an_endless_object_is_refused_at_the_limit(
    monkeypatch: pytest.MonkeyPatch, start: bytes, repeated: bytes
) -> None:
    monkeypatch.setattr(json_stream, "MAX_OBJECT_BYTES", 1000)
    with pytest.raises(NotAnObjectList, match="more than"):
        parse(start + 2000 * repeated, 64)


def test_a_long_list_takes_no_more_memory_than_a_short_one() -> None:
    row = json.dumps({"title": 4000 * "x", "images": [{"url": "y"}] * 5}).encode()
    parts = [b"[" + row, *[b"," + row] * 5000, b"]"]
    parser, count = JsonListParser(), 0
    tracemalloc.start()
    try:
        for part in parts:
            count += sum(1 for _ in parser.feed(part))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (count, parser.is_complete) == (5001, True)
    assert peak < 200_000  # of 20 MB
