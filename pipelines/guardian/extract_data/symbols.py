"""Find the declarations of a source file (classes, functions and the like), with their code and documentation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from pipelines.guardian.extract_data import comments
from pipelines.guardian.extract_data.languages import GO, PYTHON, RUST, C, Language, parser_of

if TYPE_CHECKING:
    from tree_sitter import Node

MAX_DEPTH = 50
"""The maximum nesting of declarations. Deeper ones are generated code."""

COMMENTS = frozenset({"comment", "line_comment", "block_comment"})
CALLABLE = frozenset({"arrow_function", "function_expression", "function", "generator_function"})
VALUE_HOLDERS = frozenset(
    {"variable_declarator", "field_definition", "public_field_definition", "assignment_expression"}
)
TYPES = frozenset(
    {"class", "interface", "enum", "record", "annotation", "struct", "trait", "namespace", "implementation"}
)
WRAPPERS = frozenset(
    {
        "decorated_definition",
        "export_statement",
        "expression_statement",
        "ambient_declaration",
        "lexical_declaration",
        "variable_declaration",
        "type_declaration",
    }
)
"""Nodes that wrap one declaration and belong to it."""
DECORATION = frozenset({"decorator", "accessibility_modifier"})
PREAMBLE_NODES = frozenset({"preproc_include", "import_statement", "import_declaration", "package_declaration"})
RUNNABLE_KINDS = frozenset({"function", "method", "constructor"})
"""Kinds with statements, which can be completed."""


@dataclass(frozen=True)
class Symbol:
    kind: str  # class, function, method, struct …
    name: str  # qualified: RepoReader.read
    first: int  # its lines, from 1, with the comment above it
    last: int
    code: str  # those lines, without their common indentation
    doc: str  # its docstring or comment; empty if there is none
    is_defined: bool = True  # not only declared, as in a header
    cuts: tuple[int, ...] = ()  # lines of the code, from 0, where a statement of the body begins


@dataclass(frozen=True)
class FileSymbols:
    doc: str = ""  # the docstring or comment of the file
    doc_lines: tuple[int, int] = (1, 1)
    symbols: list[Symbol] = field(default_factory=list[Symbol])


@dataclass(frozen=True)
class _Context:
    language: Language
    lines: list[str]
    scope: tuple[str, ...] = ()
    inside: str = ""  # the kind of the enclosing declaration
    depth: int = 0


def find(text: str, language: Language) -> FileSymbols:
    """All declarations of a file that have no syntax error, in order. Those inside a function are part of it."""
    root = parser_of(language.grammar).parse(text.encode()).root_node
    context = _Context(language, text.split("\n"))
    doc, lines = _file_doc(root, language)
    return FileSymbols(doc, lines, list(_declared(root, context)))


def _declared(parent: "Node", context: _Context) -> Iterator[Symbol]:
    if context.depth > MAX_DEPTH:
        return
    above = _before_block(parent)
    end = -1
    for node in parent.named_children:
        if node.type in COMMENTS or node.type == "attribute_item":
            is_own_line = node.start_point.row > end
            if above and node.start_point.row > _last_row(above[-1]) + 1:
                above = []
            above = [*above, node] if is_own_line else []
        else:
            touching = above if above and _last_row(above[-1]) + 1 >= node.start_point.row else []
            yield from _of_node(node, node, touching, context)
            above = []
        end = _last_row(node)


def _before_block(block: "Node") -> "list[Node]":
    """Comments at the beginning of a block, which Python's grammar places before the block."""
    before: list[Node] = []
    node = block.prev_named_sibling if block.type == "block" else None
    while node is not None and node.type in COMMENTS:
        before.insert(0, node)
        node = node.prev_named_sibling
    return before


def _of_node(node: "Node", outer: "Node", above: "Sequence[Node]", context: _Context) -> Iterator[Symbol]:
    """The declarations of a node. `outer` is the node with its decorators and other wrappers."""
    if kind := _kind(node, context):
        yield from _of_declaration(node, kind, outer, above, context)
    elif node.type in context.language.containers:
        inner = [child for child in node.named_children if child.type not in COMMENTS | DECORATION]
        is_group = node.type == "type_declaration" and len(inner) < node.named_child_count
        if len(inner) == 1 and node.type in WRAPPERS and not is_group:
            yield from _of_node(inner[0], outer, above, context)
        else:
            yield from _declared(node, context)


def _of_declaration(
    node: "Node", kind: str, outer: "Node", above: "Sequence[Node]", context: _Context
) -> Iterator[Symbol]:
    name = _name(node)
    if not name:
        return
    inner = _value(node)
    body = inner.child_by_field_name("body")
    names = [*context.scope, _receiver(node), name]
    full_name = context.language.separator.join(part for part in names if part)
    if kind != "implementation" and not node.has_error:
        symbol = _symbol(node, kind, full_name, outer, above, body, context)
        if symbol is not None:
            yield symbol
    if body is not None and kind in TYPES | {"module"}:
        within = _Context(context.language, context.lines, (*context.scope, name), kind, context.depth + 1)
        yield from _declared(body, within)


def _symbol(
    node: "Node",
    kind: str,
    name: str,
    outer: "Node",
    above: "Sequence[Node]",
    body: "Node | None",
    context: _Context,
) -> Symbol | None:
    before = [item for item in above if not (item.type in COMMENTS and comments.is_licence(_text(item)))]
    comment_texts = [_text(item) for item in before if item.type in COMMENTS]
    doc = (_docstring(body) if context.language is PYTHON and body is not None else "") or comments.clean_comment(
        comment_texts
    )
    shown = before if doc or any(item.type == "attribute_item" for item in before) else []
    if context.language is PYTHON:
        shown = []
    first = shown[0].start_point.row if shown else outer.start_point.row
    last = _last_row(outer)
    start = context.lines[first]
    if start[: len(start) - len(start.lstrip())] != start[: (shown[0] if shown else outer).start_point.column]:
        return None  # another declaration begins in the same line, as in minified code
    code = _dedented(context.lines[first : last + 1])
    is_defined = body is not None or kind not in RUNNABLE_KINDS
    cuts = tuple(_cuts(body, first)) if body is not None and kind in RUNNABLE_KINDS else ()
    return Symbol(kind, name, first + 1, last + 1, code, doc, is_defined, cuts)


def _kind(node: "Node", context: _Context) -> str | None:
    kind = context.language.kinds.get(node.type)
    if kind is None:
        return None
    if node.type in VALUE_HOLDERS and _value(node) is node:
        return None
    if context.language is C and not _is_c_declaration(node):
        return None
    if _value(node).type in {"class", "class_expression"}:
        return "class"
    if kind == "function" and context.inside in TYPES - {"namespace"}:
        return "method"
    if kind == "type":
        specified = node.child_by_field_name("type")
        return {"struct_type": "struct", "interface_type": "interface"}.get(specified.type if specified else "", kind)
    return kind


def _is_c_declaration(node: "Node") -> bool:
    if node.type in {"function_definition", "declaration"}:
        return _function_declarator(node) is not None
    if node.type in {"struct_specifier", "union_specifier", "enum_specifier"}:
        return node.child_by_field_name("body") is not None
    return True


def _name(node: "Node") -> str:
    if node.type in {"function_definition", "declaration"} and (declarator := _function_declarator(node)):
        return _text(declarator.child_by_field_name("declarator"))
    if node.type == "type_definition":
        return _text(_innermost(node.child_by_field_name("declarator")))
    if node.type == "impl_item":
        kind = node.child_by_field_name("type")
        return _text(kind.child_by_field_name("type") or kind) if kind else ""
    if node.type == "assignment_expression":
        left = node.child_by_field_name("left")
        return (
            _text(left).removeprefix("module.").replace(".prototype.", ".") if left and len(_text(left)) < 100 else ""
        )
    named = node.child_by_field_name("name") or node.child_by_field_name("property")
    return _text(named).strip("\"'")


def _receiver(node: "Node") -> str:
    """The type to which a method of Go belongs."""
    receiver = node.child_by_field_name("receiver")
    if receiver is None or not receiver.named_children:
        return ""
    kind = receiver.named_children[0].child_by_field_name("type")
    while kind is not None and kind.type in {"pointer_type", "generic_type", "parenthesized_type"}:
        kind = kind.child_by_field_name("type") or (kind.named_children[0] if kind.named_children else None)
    return _text(kind)


def _value(node: "Node") -> "Node":
    """The function or class that is assigned to a name, or else the node itself."""
    if node.type not in VALUE_HOLDERS:
        return node
    value = node.child_by_field_name("value") or node.child_by_field_name("right")
    return value if value is not None and value.type in CALLABLE | {"class", "class_expression"} else node


def _function_declarator(node: "Node") -> "Node | None":
    declarator = node.child_by_field_name("declarator")
    while declarator is not None and declarator.type == "pointer_declarator":
        declarator = declarator.child_by_field_name("declarator")
    if declarator is None or declarator.type != "function_declarator":
        return None
    name = declarator.child_by_field_name("declarator")
    return declarator if name is not None and name.type == "identifier" else None


def _innermost(declarator: "Node | None") -> "Node | None":
    """The name in a declarator of C."""
    while declarator is not None and declarator.type not in {"type_identifier", "identifier"}:
        inner = declarator.child_by_field_name("declarator")
        declarator = inner or next((child for child in declarator.named_children), None)
    return declarator


def _file_doc(root: "Node", language: Language) -> tuple[str, tuple[int, int]]:
    """The docstring or comment at the top that describes the file, and not the first declaration."""
    if language is PYTHON:
        doc = _docstring(root)
        first = next((node for node in root.named_children if node.type not in COMMENTS), root)
        return doc, (first.start_point.row + 1, _last_row(first) + 1)
    comment = _file_comment(root, language)
    if not comment:
        return "", (1, 1)
    return comments.clean_comment([_text(node) for node in comment]), (
        comment[0].start_point.row + 1,
        _last_row(comment[-1]) + 1,
    )


def _file_comment(root: "Node", language: Language) -> "list[Node]":
    nodes = root.named_children
    begin = next((number for number, item in enumerate(nodes) if item.type not in COMMENTS), len(nodes))
    groups: list[list[Node]] = []
    for node in nodes[:begin]:
        if comments.is_licence(_text(node)) or (language is RUST and not _text(node).startswith(("//!", "/*!"))):
            continue
        if groups and node.start_point.row <= _last_row(groups[-1][-1]) + 1:
            groups[-1].append(node)
        else:
            groups.append([node])
    if not groups or language is RUST:
        return [item for group in groups for item in group]
    following = nodes[begin] if begin < len(nodes) else None
    is_separate = following is None or following.start_point.row > _last_row(groups[-1][-1]) + 1
    if language is GO:
        return [] if is_separate else groups[-1]
    belongs_to_file = len(groups) > 1 or is_separate or (following is not None and following.type in PREAMBLE_NODES)
    return groups[0] if belongs_to_file else []


def _docstring(body: "Node") -> str:
    first = _doc_node(body)
    if first is None:
        return ""
    return comments.clean_docstring(
        "".join(_text(part) for part in first.named_children if part.type == "string_content")
    )


def _doc_node(body: "Node") -> "Node | None":
    first = next((child for child in body.named_children if child.type not in COMMENTS), None)
    if first is None or first.type != "expression_statement" or not first.named_children:
        return None
    string = first.named_children[0]
    is_text = string.type == "string" and not any(child.type == "interpolation" for child in string.named_children)
    return string if is_text else None


def _cuts(body: "Node", first: int) -> Iterator[int]:
    """The lines where a body can be cut: a statement begins there, and the one before has ended."""
    doc = _doc_node(body)
    children = body.named_children
    if len(children) == 1 and children[0].type == "statement_list":
        children = children[0].named_children
    statements = [
        statement
        for statement in children
        if statement.type not in COMMENTS and (doc is None or statement.start_byte != doc.start_byte)
    ]
    if statements and (_row_before(statements[0], body) < statements[0].start_point.row):
        yield statements[0].start_point.row - first
    for statement, following in pairwise(statements):
        if following.start_point.row > _last_row(statement):
            yield following.start_point.row - first


def _row_before(statement: "Node", body: "Node") -> int:
    """The row in which the node before the first statement ends."""
    before = statement.prev_sibling
    if before is not None:
        return _last_row(before)
    outer = body.prev_sibling
    return _last_row(outer) if outer is not None else body.start_point.row


def _last_row(node: "Node") -> int:
    """The last row of a node. Some grammars end a line comment at the beginning of the next row."""
    end = node.end_point
    return end.row - 1 if end.column == 0 and end.row > node.start_point.row else end.row


def _dedented(lines: Sequence[str]) -> str:
    """Remove the indentation of the first line from all lines that have it."""
    margin = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    return "\n".join(line.removeprefix(margin).rstrip() for line in lines)


def _text(node: "Node | None") -> str:
    return (node.text or b"").decode(errors="replace") if node is not None else ""
