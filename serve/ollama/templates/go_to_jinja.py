"""Translates chat templates from Go's language, which Ollama uses, into Jinja, which llama.cpp uses.

There are two types of Ollama templates. The newer type iterates over `.Messages` itself. The older type writes one turn
of `.System`, `.Prompt` and `.Response`. It is applied to each turn, and to the last turn only up to the response.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from serve.ollama.templates.go_parser import Block, NotTranslatable, Token, parse

WORD_BOUNDARY = re.compile(r"(?<=[a-z])(?=[A-Z])")

ROOT_VARIABLES = {
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
TURN_VARIABLES = {**ROOT_VARIABLES, **{name: f"turn.{name.lower()}" for name in ("System", "Prompt", "Response")}}
"""Go's names at the root of a template, and their expressions in Jinja."""
RENAMED_FIELDS = {"Thinking": "reasoning_content", "ToolName": "name"}
TEXTS = {"Content", "Description", "Name", "Prompt", "Response", "Role", "System", "Thinking", "ToolName", "Type"}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}

APPEND_CONTENT = '{{% set go.{0} = (go.{0} + "\\n\\n" if go.{0} else "") + (one.content or "") %}}'
FLUSH = (
    "{% set go.turns = go.turns + [{'system': go.system, 'prompt': go.prompt, 'response': go.response}] %}"
    '{% set go.system = "" %}{% set go.prompt = "" %}{% set go.response = "" %}'
)
TURNS = (
    "{% for one in messages %}"
    '{% if one.role == "system" %}{% if go.prompt or go.response %}' + FLUSH + "{% endif %}"
    + APPEND_CONTENT.format("system")
    + '{% elif one.role == "user" %}{% if go.response %}' + FLUSH + "{% endif %}" + APPEND_CONTENT.format("prompt")
    + '{% elif one.role == "assistant" %}' + APPEND_CONTENT.format("response")
    + "{% endif %}{% endfor %}"
    "{% if go.response and add_generation_prompt %}" + FLUSH + "{% endif %}" + FLUSH
)  # fmt: skip
"""Groups messages into turns: a system message if there is a new one, a prompt and a response."""
SYSTEM = (
    '{% for one in messages %}{% if one.role == "system" %}'
    + APPEND_CONTENT.format("system")
    + "{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Scope:
    """The expressions in Jinja for the dot and the variables of Go."""

    root: dict[str, str]
    dot: str | None = None  # None: the root
    variables: tuple[tuple[str, str], ...] = ()

    def with_variable(self, name: str, expression: str) -> "Scope":
        return replace(self, variables=((name, expression), *self.variables))


def to_jinja(template: str) -> str:
    blocks = parse(template)
    begin = '{% set go = namespace(system="", prompt="", response="", turns=[]) %}'
    if _mentions(blocks, "Messages"):
        return begin + SYSTEM + _JinjaWriter().write(blocks, Scope(ROOT_VARIABLES))
    if not _mentions(blocks, "Response"):
        blocks.append(Block("output", [Token("fields", ".Response")]))
    full = _JinjaWriter().write(blocks, Scope(TURN_VARIABLES))
    prefix = _JinjaWriter().write(_cut_at_response(blocks)[0], Scope(TURN_VARIABLES))
    last = "{% if loop.last and add_generation_prompt %}"
    return f"{begin}{TURNS}{{% for turn in go.turns %}}{last}{prefix}{{% else %}}{full}{{% endif %}}{{% endfor %}}"


def _mentions(blocks: Sequence[Block], field: str) -> bool:
    return any(
        any(token.kind == "fields" and field in token.value.split(".") for token in block.tokens)
        or _mentions([*block.inside, *block.otherwise], field)
        for block in blocks
    )


def _cut_at_response(blocks: Sequence[Block]) -> tuple[list[Block], bool]:
    """The blocks up to the first mention of the response, and whether there is one."""
    result: list[Block] = []
    for block in blocks:
        if _mentions([replace(block, inside=[], otherwise=[])], "Response"):
            if block.action == "output":
                result.append(block)
            return result, True
        inside, ends = _cut_at_response(block.inside)
        otherwise, ends_otherwise = ([], True) if ends else _cut_at_response(block.otherwise)
        result.append(replace(block, inside=inside, otherwise=otherwise))
        if ends or ends_otherwise:
            return result, True
    return result, False


class _JinjaWriter:
    def __init__(self) -> None:
        self._names = 0

    def write(self, blocks: Sequence[Block], scope: Scope) -> str:
        written: list[str] = []
        for block in blocks:
            if block.action == "set":
                text, scope = self._set(block, scope)
                written.append(text)
            else:
                written.append(self._block(block, scope))
        return "".join(written)

    def _block(self, block: Block, scope: Scope) -> str:
        if block.action == "text":
            return f"{{{{ {_quoted(block.text)} }}}}"
        if block.action in {"break", "continue"}:
            return f"{{% {block.action} %}}"
        if block.action == "range":
            return self._range(block, scope)
        if block.action == "output":
            return self._output(block, scope)
        expression = _PipelineReader(block.tokens, scope).pipeline()
        inner, set_dot = scope, ""
        if block.action == "with":
            name = self._new_name()
            set_dot, inner = f"{{% set go.{name} = {expression} %}}", replace(scope, dot=f"go.{name}")
        inside, otherwise = self.write(block.inside, inner), self.write(block.otherwise, scope)
        return f"{{% if {expression} %}}{set_dot}{inside}{{% else %}}{otherwise}{{% endif %}}"

    def _output(self, block: Block, scope: Scope) -> str:
        expression = _PipelineReader(block.tokens, scope).pipeline()
        *_, last = block.tokens
        if last.kind in {"text", "raw"} or (last.kind == "fields" and last.value.rpartition(".")[2] in TEXTS):
            return f"{{{{ {expression} }}}}"
        return f"{{{{ {expression} if {expression} is string else {expression} | tojson }}}}"

    def _set(self, block: Block, scope: Scope) -> tuple[str, Scope]:
        name, sign, *tokens = block.tokens
        expression = _PipelineReader(tokens, scope).pipeline()
        if sign.value == ":=":
            scope = scope.with_variable(name.value, f"go.{self._new_name()}")
        return f"{{% set {_variable_expression(name.value, scope)} = {expression} %}}", scope

    def _range(self, block: Block, scope: Scope) -> str:
        tokens, names = block.tokens, list[str]()
        signs = [token.value for token in tokens]
        if ":=" in signs:
            at = signs.index(":=")
            names, tokens = [token.value for token in tokens[:at] if token.kind == "variable"], tokens[at + 1 :]
        expression, item, index = _PipelineReader(tokens, scope).pipeline(), self._new_name(), self._new_name()
        inner = replace(scope, dot=item)
        for name, variable in zip(names[::-1], (item, f"go.{index}"), strict=False):
            inner = inner.with_variable(name, variable)
        inside, otherwise = self.write(block.inside, inner), self.write(block.otherwise, scope)
        begin = f"{{% for {item} in {expression} %}}{{% set go.{index} = loop.index0 %}}"
        return (
            f"{begin}{inside}{{% else %}}{otherwise}{{% endfor %}}" if otherwise else f"{begin}{inside}{{% endfor %}}"
        )

    def _new_name(self) -> str:
        self._names += 1
        return f"v{self._names}"


class _PipelineReader:
    """Translates a pipeline of Go into an expression of Jinja."""

    def __init__(self, tokens: Sequence[Token], scope: Scope) -> None:
        self._tokens = list(tokens)
        self._scope = scope

    def pipeline(self) -> str:
        expression = self._piped()
        if self._tokens:
            raise NotTranslatable(f"'{self._tokens[0].value}' is unexpected.")
        return expression

    def _piped(self) -> str:
        expression = self._command([])
        while self._next() == "|":
            self._tokens.pop(0)
            expression = self._command([expression])
        return expression

    def _command(self, piped: list[str]) -> str:
        if not self._tokens:
            raise NotTranslatable("an action is empty.")
        if self._tokens[0].kind == "word" and self._tokens[0].value not in {"true", "false", "nil"}:
            function = self._tokens.pop(0).value
            arguments: list[str] = []
            while self._tokens and self._next() not in {"|", ")"}:
                arguments.append(self._operand())
            return _call_function(function, [*arguments, *piped])
        if piped:
            raise NotTranslatable("only a function can take a piped value.")
        return self._operand()

    def _operand(self) -> str:
        token = self._tokens.pop(0)
        if token.value == "(" and token.kind == "sign":
            expression = self._piped()
            if self._next() != ")":
                raise NotTranslatable("a parenthesis is not closed.")
            self._tokens.pop(0)
            return self._with_fields(f"({expression})")
        if token.kind == "variable":
            if token.value == "$":
                return self._root_field() if self._is_fields() else _refuse("$")
            return self._with_fields(_variable_expression(token.value, self._scope))
        if token.kind == "fields":
            self._tokens.insert(0, token)
            return self._root_field() if self._scope.dot is None else self._with_fields(self._scope.dot)
        if token.value == "." and token.kind == "sign":
            return self._scope.dot or _refuse(".")
        if token.kind in {"text", "raw"}:
            return token.value if token.kind == "text" else _quoted(token.value)
        if token.kind == "number":
            return token.value
        if token.kind == "word":
            return {"true": "true", "false": "false", "nil": "none"}.get(token.value) or _call_function(token.value, [])
        return _refuse(token.value)

    def _root_field(self) -> str:
        first, *others = self._tokens.pop(0).value.split(".")[1:]
        if first not in self._scope.root:
            return _refuse(f".{first}")
        return _field(self._scope.root[first], others)

    def _with_fields(self, target: str) -> str:
        return _field(target, self._tokens.pop(0).value.split(".")[1:]) if self._is_fields() else target

    def _is_fields(self) -> bool:
        return bool(self._tokens) and self._tokens[0].kind == "fields"

    def _next(self) -> str | None:
        return self._tokens[0].value if self._tokens and self._tokens[0].kind == "sign" else None


def _field(target: str, names: Sequence[str]) -> str:
    for name in names:
        target = f"{target}.{RENAMED_FIELDS.get(name) or WORD_BOUNDARY.sub('_', name).lower()}"
    # A message that only calls tools has no content.
    return f'({target} or "")' if names and names[-1] in {"Content", "Thinking"} else target


def _variable_expression(variable: str, scope: Scope) -> str:
    return next((expression for name, expression in scope.variables if name == variable), None) or _refuse(variable)


def _call_function(function: str, arguments: list[str]) -> str:
    write = FUNCTIONS.get(function)
    if write is None:
        raise NotTranslatable(f"the function '{function}' is not supported.")
    try:
        return write(*arguments)
    except TypeError:
        raise NotTranslatable(f"'{function}' has the wrong number of arguments.") from None


def _compare(sign: str) -> Callable[..., str]:
    def write(first: str, second: str, *others: str) -> str:
        return "(" + " or ".join(f"{first} {sign} {other}" for other in (second, *others)) + ")"

    return write


def _join(operator: str) -> Callable[..., str]:
    def write(first: str, *others: str) -> str:
        return "(" + f" {operator} ".join([first, *others]) + ")"

    return write


def _filter(name: str) -> Callable[..., str]:
    def write(expression: str) -> str:
        return f"({expression} | {name})"

    return write


def _not(expression: str) -> str:
    return f"(not {expression})"


def _index(target: str, *keys: str) -> str:
    return target + "".join(f"[{key}]" for key in keys)


def _slice(target: str, begin: str = "", end: str = "") -> str:
    return f"{target}[{begin}:{end}]"


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


def _refuse(name: str) -> str:
    raise NotTranslatable(f"'{name}' is not supported.")
