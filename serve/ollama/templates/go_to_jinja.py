"""Templates of conversations in Go's language, as Ollama has them, said in Jinja, as llama.cpp wants them.

A template of Ollama's is of one of two sorts. The newer one goes through `.Messages` itself. The older one writes a
single turn of `.System`, `.Prompt` and `.Response`, is used for each turn, and for the last one only up to where the
response begins.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from serve.ollama.templates.go_parser import Block, NotTranslatable, Token, parsed

WORD = re.compile(r"(?<=[a-z])(?=[A-Z])")

ROOT = {
    "Messages": "messages",
    "Tools": "(tools or [])",
    "System": "go.system",
    "Prompt": '""',
    "Response": '""',
    "Suffix": '""',
    "Think": "enable_thinking",
    "ThinkLevel": '""',
    "IsThinkSet": "(enable_thinking is defined)",
}
TURN = {**ROOT, **{name: f"turn.{name.lower()}" for name in ("System", "Prompt", "Response")}}
"""What the template itself is told, by Go's names."""
NAMES = {"Thinking": "reasoning_content", "ToolName": "name"}
TEXTS = {"Content", "Description", "Name", "Prompt", "Response", "Role", "System", "Thinking", "ToolName", "Type"}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}

JOINED = '{{% set go.{0} = (go.{0} + "\\n\\n" if go.{0} else "") + (one.content or "") %}}'
FLUSH = (
    "{% set go.turns = go.turns + [{'system': go.system, 'prompt': go.prompt, 'response': go.response}] %}"
    '{% set go.system = "" %}{% set go.prompt = "" %}{% set go.response = "" %}'
)
TURNS = (
    "{% for one in messages %}"
    '{% if one.role == "system" %}{% if go.prompt or go.response %}' + FLUSH + "{% endif %}" + JOINED.format("system")
    + '{% elif one.role == "user" %}{% if go.response %}' + FLUSH + "{% endif %}" + JOINED.format("prompt")
    + '{% elif one.role == "assistant" %}' + JOINED.format("response")
    + "{% endif %}{% endfor %}"
    "{% if go.response and add_generation_prompt %}" + FLUSH + "{% endif %}" + FLUSH
)  # fmt: skip
"""A conversation as turns: a system message, if there is a new one, what was asked, and what was answered."""
SYSTEM = '{% for one in messages %}{% if one.role == "system" %}' + JOINED.format("system") + "{% endif %}{% endfor %}"


@dataclass(frozen=True)
class Scope:
    """What the dot and the variables mean here."""

    root: dict[str, str]
    dot: str | None = None  # in Jinja; None: the root
    variables: tuple[tuple[str, str], ...] = ()

    def knows(self, name: str, meaning: str) -> "Scope":
        return replace(self, variables=((name, meaning), *self.variables))


def as_jinja(template: str) -> str:
    blocks = parsed(template)
    begin = '{% set go = namespace(system="", prompt="", response="", turns=[]) %}'
    if _speaks_of(blocks, "Messages"):
        return begin + SYSTEM + _Writer().write(blocks, Scope(ROOT))
    if not _speaks_of(blocks, "Response"):
        blocks.append(Block("output", [Token("fields", ".Response")]))
    whole = _Writer().write(blocks, Scope(TURN))
    begun = _Writer().write(_cut(blocks)[0], Scope(TURN))
    last = "{% if loop.last and add_generation_prompt %}"
    return f"{begin}{TURNS}{{% for turn in go.turns %}}{last}{begun}{{% else %}}{whole}{{% endif %}}{{% endfor %}}"


def _speaks_of(blocks: Sequence[Block], field: str) -> bool:
    return any(
        any(token.kind == "fields" and field in token.value.split(".") for token in block.tokens)
        or _speaks_of([*block.inside, *block.otherwise], field)
        for block in blocks
    )


def _cut(blocks: Sequence[Block]) -> tuple[list[Block], bool]:
    """The same up to where the response is spoken of, and whether it is."""
    kept: list[Block] = []
    for block in blocks:
        if _speaks_of([replace(block, inside=[], otherwise=[])], "Response"):
            if block.action == "output":
                kept.append(block)
            return kept, True
        inside, ends = _cut(block.inside)
        otherwise, ends_otherwise = ([], True) if ends else _cut(block.otherwise)
        kept.append(replace(block, inside=inside, otherwise=otherwise))
        if ends or ends_otherwise:
            return kept, True
    return kept, False


class _Writer:
    def __init__(self) -> None:
        self._names = 0

    def write(self, blocks: Sequence[Block], scope: Scope) -> str:
        written: list[str] = []
        for block in blocks:
            if block.action == "set":
                text, scope = self._set(block, scope)
                written.append(text)
            else:
                written.append(self._one(block, scope))
        return "".join(written)

    def _one(self, block: Block, scope: Scope) -> str:
        if block.action == "text":
            return f"{{{{ {_quoted(block.text)} }}}}"
        if block.action in {"break", "continue"}:
            return f"{{% {block.action} %}}"
        if block.action == "range":
            return self._range(block, scope)
        if block.action == "output":
            return self._output(block, scope)
        what = _Reader(block.tokens, scope).pipeline()
        inner, set_dot = scope, ""
        if block.action == "with":
            name = self._new()
            set_dot, inner = f"{{% set go.{name} = {what} %}}", replace(scope, dot=f"go.{name}")
        inside, otherwise = self.write(block.inside, inner), self.write(block.otherwise, scope)
        return f"{{% if {what} %}}{set_dot}{inside}{{% else %}}{otherwise}{{% endif %}}"

    def _output(self, block: Block, scope: Scope) -> str:
        what = _Reader(block.tokens, scope).pipeline()
        *_, last = block.tokens
        if last.kind in {"text", "raw"} or (last.kind == "fields" and last.value.rpartition(".")[2] in TEXTS):
            return f"{{{{ {what} }}}}"
        return f"{{{{ {what} if {what} is string else {what} | tojson }}}}"

    def _set(self, block: Block, scope: Scope) -> tuple[str, Scope]:
        name, sign, *tokens = block.tokens
        what = _Reader(tokens, scope).pipeline()
        if sign.value == ":=":
            scope = scope.knows(name.value, f"go.{self._new()}")
        return f"{{% set {_meaning(name.value, scope)} = {what} %}}", scope

    def _range(self, block: Block, scope: Scope) -> str:
        tokens, names = block.tokens, list[str]()
        signs = [token.value for token in tokens]
        if ":=" in signs:
            at = signs.index(":=")
            names, tokens = [token.value for token in tokens[:at] if token.kind == "variable"], tokens[at + 1 :]
        what, one, index = _Reader(tokens, scope).pipeline(), self._new(), self._new()
        inner = replace(scope, dot=one)
        for name, meaning in zip(names[::-1], (one, f"go.{index}"), strict=False):
            inner = inner.knows(name, meaning)
        inside, otherwise = self.write(block.inside, inner), self.write(block.otherwise, scope)
        begin = f"{{% for {one} in {what} %}}{{% set go.{index} = loop.index0 %}}"
        return (
            f"{begin}{inside}{{% else %}}{otherwise}{{% endfor %}}" if otherwise else f"{begin}{inside}{{% endfor %}}"
        )

    def _new(self) -> str:
        self._names += 1
        return f"v{self._names}"


class _Reader:
    """Reads a pipeline of Go's as an expression of Jinja's."""

    def __init__(self, tokens: Sequence[Token], scope: Scope) -> None:
        self._tokens = list(tokens)
        self._scope = scope

    def pipeline(self) -> str:
        read = self._piped()
        if self._tokens:
            raise NotTranslatable(f"'{self._tokens[0].value}' is not expected there.")
        return read

    def _piped(self) -> str:
        read = self._command([])
        while self._next() == "|":
            self._tokens.pop(0)
            read = self._command([read])
        return read

    def _command(self, piped: list[str]) -> str:
        if not self._tokens:
            raise NotTranslatable("an action has nothing in it.")
        if self._tokens[0].kind == "word" and self._tokens[0].value not in {"true", "false", "nil"}:
            function = self._tokens.pop(0).value
            arguments: list[str] = []
            while self._tokens and self._next() not in {"|", ")"}:
                arguments.append(self._operand())
            return _called(function, [*arguments, *piped])
        if piped:
            raise NotTranslatable("only a function takes what is piped to it.")
        return self._operand()

    def _operand(self) -> str:
        token = self._tokens.pop(0)
        if token.value == "(" and token.kind == "sign":
            read = self._piped()
            if self._next() != ")":
                raise NotTranslatable("a parenthesis is not closed.")
            self._tokens.pop(0)
            return self._with_fields(f"({read})")
        if token.kind == "variable":
            if token.value == "$":
                return self._of_root() if self._is_fields() else _refuse("$")
            return self._with_fields(_meaning(token.value, self._scope))
        if token.kind == "fields":
            self._tokens.insert(0, token)
            return self._of_root() if self._scope.dot is None else self._with_fields(self._scope.dot)
        if token.value == "." and token.kind == "sign":
            return self._scope.dot or _refuse(".")
        if token.kind in {"text", "raw"}:
            return token.value if token.kind == "text" else _quoted(token.value)
        if token.kind == "number":
            return token.value
        if token.kind == "word":
            return {"true": "true", "false": "false", "nil": "none"}.get(token.value) or _called(token.value, [])
        return _refuse(token.value)

    def _of_root(self) -> str:
        first, *others = self._tokens.pop(0).value.split(".")[1:]
        if first not in self._scope.root:
            return _refuse(f".{first}")
        return _field(self._scope.root[first], others)

    def _with_fields(self, of: str) -> str:
        return _field(of, self._tokens.pop(0).value.split(".")[1:]) if self._is_fields() else of

    def _is_fields(self) -> bool:
        return bool(self._tokens) and self._tokens[0].kind == "fields"

    def _next(self) -> str | None:
        return self._tokens[0].value if self._tokens and self._tokens[0].kind == "sign" else None


def _field(of: str, names: Sequence[str]) -> str:
    for name in names:
        of = f"{of}.{NAMES.get(name) or WORD.sub('_', name).lower()}"
    # A message that only calls tools has no content.
    return f'({of} or "")' if names and names[-1] in {"Content", "Thinking"} else of


def _meaning(variable: str, scope: Scope) -> str:
    return next((meaning for name, meaning in scope.variables if name == variable), None) or _refuse(variable)


def _called(function: str, arguments: list[str]) -> str:
    write = FUNCTIONS.get(function)
    if write is None:
        raise NotTranslatable(f"the function '{function}' is not known here.")
    try:
        return write(*arguments)
    except TypeError:
        raise NotTranslatable(f"'{function}' is not given what it takes.") from None


def _compare(sign: str) -> Callable[..., str]:
    def write(first: str, second: str, *others: str) -> str:
        return "(" + " or ".join(f"{first} {sign} {other}" for other in (second, *others)) + ")"

    return write


def _join(word: str) -> Callable[..., str]:
    def write(first: str, *others: str) -> str:
        return "(" + f" {word} ".join([first, *others]) + ")"

    return write


def _filter(name: str) -> Callable[..., str]:
    def write(what: str) -> str:
        return f"({what} | {name})"

    return write


def _not(what: str) -> str:
    return f"(not {what})"


def _index(of: str, *places: str) -> str:
    return of + "".join(f"[{place}]" for place in places)


def _slice(of: str, begin: str = "", end: str = "") -> str:
    return f"{of}[{begin}:{end}]"


FUNCTIONS: dict[str, Callable[..., str]] = {
    **{name: _compare(sign) for name, sign in COMPARISONS.items()},
    "and": _join("and"),
    "or": _join("or"),
    "not": _not,
    "len": _filter("length"),
    "json": _filter("tojson"),
    "index": _index,
    "slice": _slice,
}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _refuse(what: str) -> str:
    raise NotTranslatable(f"'{what}' is not known here.")
