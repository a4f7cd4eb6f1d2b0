"""Parse a long JSON list of objects while it is received, one object at a time, in bounded memory."""

import re
from collections.abc import Generator
from typing import Any

import orjson

MAX_OBJECT_BYTES = 4 * 1024 * 1024
"""Maximum size of an object in the list, and so of the buffer."""
BRACKET = re.compile(rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+([\[\]{}])', re.DOTALL)
"""The next bracket outside of strings. The possessive quantifiers prevent backtracking."""
WHITESPACE = b" \t\r\n"


class NotAnObjectList(ValueError):
    """The text is not a JSON list of objects."""


class JsonListParser:
    def __init__(self) -> None:
        self.is_complete = False  # whether the end of the list was parsed
        self._buffer = bytearray()  # text that is not parsed yet
        self._scanned = 0  # how much of it was searched for brackets
        self._depth = 0  # the number of open brackets
        self._separator = b""  # what must precede the next object

    def feed(self, chunk: bytes) -> Generator[dict[str, Any]]:
        """Take a chunk of any length, and yield the objects that it completes."""
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
            raise NotAnObjectList(f"an object in the list has more than {MAX_OBJECT_BYTES // 1024 // 1024} MiB")

    def _check_between_objects(self, text: bytes, bracket_character: bytes) -> None:
        """Check the text between objects: only brackets and commas are valid there."""
        if self.is_complete:
            raise NotAnObjectList("something follows the list")
        expected = b"[" if self._depth == 0 else b"{]"
        if bracket_character not in expected or text != (self._separator if bracket_character == b"{" else b""):
            raise NotAnObjectList("it is not a list of objects")


def _parse_object(text: bytearray) -> dict[str, Any]:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise NotAnObjectList("an object in the list is broken") from None
