"""A long list of objects in JSON, one by one as they come: neither the text nor what is in it is ever held whole."""

import re
from collections.abc import Generator
from typing import Any

import orjson

MAX_OBJECT_BYTES = 4 * 1024 * 1024
"""More than any object of a list has. Of what is not finished yet, no more is held."""
BRACKET = re.compile(rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+([\[\]{}])', re.DOTALL)
"""The next bracket that is in no string. It never goes back over what it has read."""
WHITESPACE = b" \t\r\n"


class NotAnObjectList(ValueError):
    """It is no list of objects in JSON."""


class JsonListParser:
    """Takes the text in parts of any length."""

    def __init__(self) -> None:
        self.is_complete = False  # the whole list has come
        self._buffer = bytearray()  # what is not done yet
        self._scanned = 0  # how much of it was looked at
        self._depth = 0  # how many brackets are open
        self._separator = b""  # what has to stand before the next object

    def feed(self, chunk: bytes) -> Generator[dict[str, Any]]:
        """The objects that are whole with this part."""
        self._buffer += chunk
        object_start, position = 0, self._scanned
        while bracket := BRACKET.match(self._buffer, position):
            bracket_position, bracket_character = bracket.start(1), bracket[1]
            if self._depth < 2:
                self._check_between_objects(
                    bytes(self._buffer[position:bracket_position]).strip(WHITESPACE), bracket_character
                )
                object_start = bracket_position
            self._depth += 1 if bracket_character in b"[{" else -1
            position = bracket_position + 1
            if self._depth == 1 and position - object_start > 1:
                yield _parse_object(self._buffer[object_start:position])
                self._separator = b","
            self.is_complete = self._depth == 0
        if self.is_complete and self._buffer[position:].strip(WHITESPACE):
            raise NotAnObjectList("something follows the list")
        consumed = object_start if self._depth > 1 else position
        del self._buffer[:consumed]
        self._scanned = position - consumed
        if len(self._buffer) > MAX_OBJECT_BYTES:
            raise NotAnObjectList(f"something in the list has more than {MAX_OBJECT_BYTES // 1024 // 1024} MiB")

    def _check_between_objects(self, text: bytes, bracket_character: bytes) -> None:
        """Outside of its objects, a list is a bracket, commas, and another bracket."""
        if self.is_complete:
            raise NotAnObjectList("something follows the list")
        expected = b"[" if self._depth == 0 else b"{]"
        if bracket_character not in expected or text != (self._separator if bracket_character == b"{" else b""):
            raise NotAnObjectList("it is no list of objects")


def _parse_object(text: bytearray) -> dict[str, Any]:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise NotAnObjectList("an object in the list is broken") from None
