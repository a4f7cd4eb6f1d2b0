"""Parses Go's template language into blocks: texts, and actions between {{ and }}, which may contain blocks."""

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
    """The template is invalid, or Jinja has no equivalent for something in it."""


@dataclass(frozen=True)
class Token:
    kind: str
    value: str


@dataclass
class Block:
    """A text or an action. The actions if, range and with contain blocks up to their end."""

    action: str  # text, output, set, if, range, with, break, continue; in between also else, end
    tokens: list[Token] = field(default_factory=list[Token])
    inside: "list[Block]" = field(default_factory=lambda: list[Block]())
    otherwise: "list[Block]" = field(default_factory=lambda: list[Block]())
    text: str = ""


def parse(template: str) -> list[Block]:
    pieces = list(_pieces(template))
    blocks, end = _blocks(pieces, 0)
    if end < len(pieces):
        raise NotTranslatable(f"'{pieces[end].action}' has no matching 'if', 'range' or 'with'.")
    return blocks


def _pieces(template: str) -> Iterator[Block]:
    """Texts, trimmed as their actions say, and actions, in their order."""
    position, trim = 0, False
    while (begin := template.find("{{", position)) >= 0:
        found = ACTION.match(template, begin)
        if found is None:
            raise NotTranslatable("an action begins with {{ and is not closed.")
        yield from _text(template[position:begin], trim_left=trim, trim_right=bool(found["left"]))
        if not COMMENT.fullmatch(found["inside"]):
            yield _action(_tokens(found["inside"]))
        position, trim = found.end(), bool(found["right"])
    yield from _text(template[position:], trim_left=trim)


def _text(text: str, *, trim_left: bool, trim_right: bool = False) -> Iterator[Block]:
    text = text.lstrip() if trim_left else text
    text = text.rstrip() if trim_right else text
    if text:
        yield Block("text", text=text)


def _action(tokens: list[Token]) -> Block:
    if not tokens:
        raise NotTranslatable("an action is empty.")
    first = tokens[0].value if tokens[0].kind == "word" else ""
    if first in {"if", "range", "with", "else", "end", "break", "continue"}:
        return Block(first, tokens[1:])
    if first in {"define", "template", "block"}:
        raise NotTranslatable(f"'{first}' is not supported.")
    is_set = len(tokens) > 1 and tokens[0].kind == "variable" and tokens[1].value in {":=", "="}
    return Block("set" if is_set else "output", tokens)


def _tokens(inside: str) -> list[Token]:
    tokens: list[Token] = []
    position, inside = 0, inside.rstrip()
    while position < len(inside):
        found = TOKEN.match(inside, position)
        if found is None:
            raise NotTranslatable(f"'{inside[position:].strip()[:MAX_SHOWN_CHARACTERS]}' is invalid.")
        kind = found.lastgroup or ""
        tokens.append(Token(kind, found[kind]))
        position = found.end()
    return tokens


def _blocks(pieces: Sequence[Block], position: int) -> tuple[list[Block], int]:
    """The blocks up to the `else` or `end` of the enclosing block, and the position of that."""
    blocks: list[Block] = []
    while position < len(pieces) and pieces[position].action not in {"else", "end"}:
        block = pieces[position]
        position += 1
        if block.action in {"if", "range", "with"}:
            position = _fill_block(block, pieces, position)
        blocks.append(block)
    return blocks, position


def _fill_block(block: Block, pieces: Sequence[Block], position: int) -> int:
    """Add the inner blocks to a block. Returns the position after its end."""
    block.inside, position = _blocks(pieces, position)
    if position < len(pieces) and pieces[position].action == "else":
        tokens = pieces[position].tokens
        if tokens:  # "else if" shares the end of its "if"
            other = Block(tokens[0].value, tokens[1:])
            if other.action not in {"if", "with"}:
                raise NotTranslatable(f"'else {other.action}' is not supported.")
            block.otherwise = [other]
            return _fill_block(other, pieces, position + 1)
        block.otherwise, position = _blocks(pieces, position + 1)
    if position >= len(pieces) or pieces[position].action != "end":
        raise NotTranslatable(f"'{block.action}' has no end.")
    return position + 1
