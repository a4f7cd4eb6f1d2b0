"""A long list of objects in JSON, one by one as they come: neither the text nor what is in it is ever held whole."""

import re
from collections.abc import Generator
from typing import Any

import orjson

OBJECT_BYTES = 4 * 1024 * 1024
"""More than any object of a list has. Of what is not finished yet, no more is held."""
BRACKET = re.compile(rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+([\[\]{}])', re.DOTALL)
"""The next bracket that is in no string. It never goes back over what it has read."""
BLANK = b" \t\r\n"


class NotAList(ValueError):
    """It is no list of objects in JSON."""


class Objects:
    """Takes the text in parts of any length."""

    def __init__(self) -> None:
        self.ended = False  # the whole list has come
        self._text = bytearray()  # what is not done yet
        self._seen = 0  # how much of it was looked at
        self._depth = 0  # how many brackets are open
        self._separator = b""  # what has to stand before the next object

    def feed(self, part: bytes) -> Generator[dict[str, Any]]:
        """The objects that are whole with this part."""
        self._text += part
        begin, position = 0, self._seen
        while bracket := BRACKET.match(self._text, position):
            place, sign = bracket.start(1), bracket[1]
            if self._depth < 2:
                self._check_outside(bytes(self._text[position:place]).strip(BLANK), sign)
                begin = place
            self._depth += 1 if sign in b"[{" else -1
            position = place + 1
            if self._depth == 1 and position - begin > 1:
                yield _loaded(self._text[begin:position])
                self._separator = b","
            self.ended = self._depth == 0
        if self.ended and self._text[position:].strip(BLANK):
            raise NotAList("something follows the list")
        done = begin if self._depth > 1 else position
        del self._text[:done]
        self._seen = position - done
        if len(self._text) > OBJECT_BYTES:
            raise NotAList(f"something in the list has more than {OBJECT_BYTES // 1024 // 1024} MiB")

    def _check_outside(self, between: bytes, sign: bytes) -> None:
        """Outside of its objects, a list is a bracket, commas, and another bracket."""
        if self.ended:
            raise NotAList("something follows the list")
        wanted = b"[" if self._depth == 0 else b"{]"
        if sign not in wanted or between != (self._separator if sign == b"{" else b""):
            raise NotAList("it is no list of objects")


def _loaded(text: bytearray) -> dict[str, Any]:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise NotAList("an object in the list is broken") from None
