"""The language of Go's templates: text, and actions between {{ and }}, some of which have more of both inside."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

ACTION = re.compile(
    r"""\{\{(?P<left>-(?=\s))?(?P<inside>(?:"(?:\\.|[^"\\])*"|`[^`]*`|[^"`])*?)(?P<right>(?<=\s)-)?\}\}"""
)
COMMENT = re.compile(r"\s*/\*.*\*/\s*", re.DOTALL)
TOKEN = re.compile(
    r"""\s*(?:(?P<text>"(?:\\.|[^"\\])*")|`(?P<raw>[^`]*)`|(?P<number>-?\d+)|(?P<variable>\$\w*)"""
    r"""|(?P<fields>(?:\.[A-Za-z]\w*)+)|(?P<word>[A-Za-z]\w*)|(?P<sign>:=|[.()|,=]))"""
)

MAX_SHOWN_CHARACTERS = 50


class NotTranslatable(ValueError):
    """The template is none, or has something in it that Jinja cannot say."""


@dataclass(frozen=True)
class Token:
    kind: str
    value: str


@dataclass
class Block:
    """An action and what stands between it and its end. An output, and text, have nothing between."""

    action: str  # text, output, set, if, range, with, break, continue
    tokens: list[Token] = field(default_factory=list[Token])
    inside: "list[Block]" = field(default_factory=lambda: list[Block]())
    otherwise: "list[Block]" = field(default_factory=lambda: list[Block]())
    text: str = ""


def parse(template: str) -> list[Block]:
    pieces = list(_pieces(template))
    blocks, end = _blocks(pieces, 0)
    if end < len(pieces):
        raise NotTranslatable(f"'{pieces[end].action}' belongs to nothing.")
    return blocks


def _pieces(template: str) -> Iterator[Block]:
    """Text and actions, one after the other. What is trimmed is gone."""
    position, trim = 0, False
    while (begin := template.find("{{", position)) >= 0:
        found = ACTION.match(template, begin)
        if found is None:
            raise NotTranslatable("an action begins with {{ and does not end.")
        yield from _text(template[position:begin], trim_left=trim, trim_right=bool(found["left"]))
        if not COMMENT.fullmatch(found["inside"]):
            yield _action(_tokens(found["inside"]))
        position, trim = found.end(), bool(found["right"])
    yield from _text(template[position:], trim_left=trim)


def _text(text: str, *, trim_left: bool, trim_right: bool = False) -> Iterator[Block]:
    """What is left of it when its beginning, or its end, is trimmed."""
    text = text.lstrip() if trim_left else text
    text = text.rstrip() if trim_right else text
    if text:
        yield Block("text", text=text)


def _action(tokens: list[Token]) -> Block:
    if not tokens:
        raise NotTranslatable("an action has nothing in it.")
    first = tokens[0].value if tokens[0].kind == "word" else ""
    if first in {"if", "range", "with", "else", "end", "break", "continue"}:
        return Block(first, tokens[1:])
    if first in {"define", "template", "block"}:
        raise NotTranslatable(f"'{first}' is not known here.")
    is_set = len(tokens) > 1 and tokens[0].kind == "variable" and tokens[1].value in {":=", "="}
    return Block("set" if is_set else "output", tokens)


def _tokens(inside: str) -> list[Token]:
    tokens: list[Token] = []
    position, inside = 0, inside.rstrip()
    while position < len(inside):
        found = TOKEN.match(inside, position)
        if found is None:
            raise NotTranslatable(f"'{inside[position:].strip()[:MAX_SHOWN_CHARACTERS]}' cannot be read.")
        kind = found.lastgroup or ""
        tokens.append(Token(kind, found[kind]))
        position = found.end()
    return tokens


def _blocks(pieces: Sequence[Block], position: int) -> tuple[list[Block], int]:
    """What stands here up to an `else` or `end` that belongs to somebody else, and where that is."""
    blocks: list[Block] = []
    while position < len(pieces) and pieces[position].action not in {"else", "end"}:
        block = pieces[position]
        position += 1
        if block.action in {"if", "range", "with"}:
            position = _fill_block(block, pieces, position)
        blocks.append(block)
    return blocks, position


def _fill_block(block: Block, pieces: Sequence[Block], position: int) -> int:
    """Give a block what is between it and its end; returns where it goes on behind that."""
    block.inside, position = _blocks(pieces, position)
    if position < len(pieces) and pieces[position].action == "else":
        tokens = pieces[position].tokens
        if tokens:  # else if, which ends with the same end
            other = Block(tokens[0].value, tokens[1:])
            if other.action not in {"if", "with"}:
                raise NotTranslatable(f"'else {other.action}' is not known here.")
            block.otherwise = [other]
            return _fill_block(other, pieces, position + 1)
        block.otherwise, position = _blocks(pieces, position + 1)
    if position >= len(pieces) or pieces[position].action != "end":
        raise NotTranslatable(f"'{block.action}' has no end.")
    return position + 1
