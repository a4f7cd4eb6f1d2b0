"""Lists that are read object by object, in parts of any length."""

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


def read(text: bytes, length: int) -> list[dict[str, Any]]:
    objects = JsonListParser()
    found = [one for begin in range(0, len(text), length) for one in objects.feed(text[begin : begin + length])]
    if not objects.is_complete:
        raise NotAnObjectList("it has no end")
    return found


@given(LISTS, st.integers(1, 40), st.sampled_from([None, 2]), st.booleans())
def test_a_list_is_what_json_says_whatever_its_parts(
    wanted: list[dict[str, Any]], length: int, indent: int | None, ascii_only: bool
) -> None:
    assert read(json.dumps(wanted, indent=indent, ensure_ascii=ascii_only).encode(), length) == wanted


@given(st.binary(max_size=30) | st.text('[]{},:"\\ 1a', max_size=14).map(str.encode), st.integers(1, 5))
def test_what_json_does_not_take_for_a_list_of_objects_is_none(text: bytes, length: int) -> None:
    try:
        told: Any = json.loads(text)
    except ValueError:
        told = None
    if isinstance(told, list) and all(isinstance(one, dict) for one in told):
        assert read(text, length) == told
    else:
        with pytest.raises(NotAnObjectList):
            read(text, length)


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
def test_what_is_none(text: bytes, length: int) -> None:
    with pytest.raises(NotAnObjectList):
        read(text, length if len(text) < 1000 else 1000)


@pytest.mark.parametrize(
    ("begin", "more"), [(b'[{"a":"', b"x"), (b"[", b" "), (b"[{}", b","), (b'[{"a":[{}', b",{}"), (b"[", b"\t\n")]
)
def test_of_what_has_no_end_not_all_is_held(monkeypatch: pytest.MonkeyPatch, begin: bytes, more: bytes) -> None:
    monkeypatch.setattr(json_stream, "MAX_OBJECT_BYTES", 1000)
    with pytest.raises(NotAnObjectList, match="more than"):
        read(begin + 2000 * more, 64)


def test_a_long_list_takes_no_more_memory_than_a_short_one() -> None:
    row = json.dumps({"title": 4000 * "x", "images": [{"url": "y"}] * 5}).encode()
    parts = [b"[" + row, *[b"," + row] * 5000, b"]"]
    objects, found = JsonListParser(), 0
    tracemalloc.start()
    try:
        for part in parts:
            found += sum(1 for _ in objects.feed(part))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found, objects.is_complete) == (5001, True)
    assert peak < 200_000  # of 20 MB
