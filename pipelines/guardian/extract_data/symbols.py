"""What a source file declares: classes, functions and the like, with what the file itself says of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from pipelines.guardian.extract_data import comments
from pipelines.guardian.extract_data.languages import GO, PYTHON, RUST, C, Language, parser_of

if TYPE_CHECKING:
    from tree_sitter import Node

MAX_DEPTH = 50
"""How deep declarations may lie in each other. Deeper ones were not written by a person."""

COMMENTS = frozenset({"comment", "line_comment", "block_comment"})
CALLABLE = frozenset({"arrow_function", "function_expression", "function", "generator_function"})
HOLDS_A_VALUE = frozenset(
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
"""Nodes around one declaration that belong to it."""
DECORATION = frozenset({"decorator", "accessibility_modifier"})
AFTER_THE_BEGINNING = frozenset({"preproc_include", "import_statement", "import_declaration", "package_declaration"})
RUN = frozenset({"function", "method", "constructor"})
"""What has statements, so that it can be completed."""


@dataclass(frozen=True)
class Symbol:
    kind: str  # class, function, method, struct …
    name: str  # with the names around it: Checkout.read
    first: int  # the lines it takes, from 1, with the comment above it
    last: int
    code: str  # those lines, without their common indentation
    doc: str  # what the file says of it; empty if it says nothing
    is_defined: bool = True  # not only declared, as in a header
    cuts: tuple[int, ...] = ()  # lines of the code, from 0, where a statement of its body begins


@dataclass(frozen=True)
class Found:
    doc: str = ""  # what the file says of itself
    doc_lines: tuple[int, int] = (1, 1)
    symbols: list[Symbol] = field(default_factory=list[Symbol])


@dataclass(frozen=True)
class _Place:
    language: Language
    lines: list[str]
    scope: tuple[str, ...] = ()
    inside: str = ""  # the kind of what is around
    depth: int = 0


def find(text: str, language: Language) -> Found:
    """Every declaration of a file that is whole, in its order. What is inside a function belongs to that function."""
    root = parser_of(language.grammar).parse(text.encode()).root_node
    place = _Place(language, text.split("\n"))
    doc, lines = _of_the_file(root, language)
    return Found(doc, lines, list(_declared(root, place)))


def _declared(parent: "Node", place: _Place) -> Iterator[Symbol]:
    if place.depth > MAX_DEPTH:
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
            yield from _of_node(node, node, touching, place)
            above = []
        end = _last_row(node)


def _before_block(block: "Node") -> "list[Node]":
    """Comments at the beginning of a block, which Python's grammar has in front of it."""
    before: list[Node] = []
    node = block.prev_named_sibling if block.type == "block" else None
    while node is not None and node.type in COMMENTS:
        before.insert(0, node)
        node = node.prev_named_sibling
    return before


def _of_node(node: "Node", outer: "Node", above: "Sequence[Node]", place: _Place) -> Iterator[Symbol]:
    """What a node declares. `outer` is the whole of it, with decorators and the like."""
    if kind := _kind(node, place):
        yield from _of_declaration(node, kind, outer, above, place)
    elif node.type in place.language.around:
        inner = [one for one in node.named_children if one.type not in COMMENTS | DECORATION]
        is_group = node.type == "type_declaration" and len(inner) < node.named_child_count
        if len(inner) == 1 and node.type in WRAPPERS and not is_group:
            yield from _of_node(inner[0], outer, above, place)
        else:
            yield from _declared(node, place)


def _of_declaration(node: "Node", kind: str, outer: "Node", above: "Sequence[Node]", place: _Place) -> Iterator[Symbol]:
    name = _name(node)
    if not name:
        return
    inner = _value(node)
    body = inner.child_by_field_name("body")
    names = [*place.scope, _receiver(node), name]
    full_name = place.language.separator.join(one for one in names if one)
    if kind != "implementation" and not node.has_error:
        symbol = _symbol(node, kind, full_name, outer, above, body, place)
        if symbol is not None:
            yield symbol
    if body is not None and kind in TYPES | {"module"}:
        within = _Place(place.language, place.lines, (*place.scope, name), kind, place.depth + 1)
        yield from _declared(body, within)


def _symbol(
    node: "Node",
    kind: str,
    name: str,
    outer: "Node",
    above: "Sequence[Node]",
    body: "Node | None",
    place: _Place,
) -> Symbol | None:
    before = [one for one in above if not (one.type in COMMENTS and comments.is_licence(_text(one)))]
    told = [_text(one) for one in before if one.type in COMMENTS]
    doc = (_docstring(body) if place.language is PYTHON and body is not None else "") or comments.comment(told)
    shown = before if doc or any(one.type == "attribute_item" for one in before) else []
    if place.language is PYTHON:
        shown = []
    first = shown[0].start_point.row if shown else outer.start_point.row
    last = _last_row(outer)
    start = place.lines[first]
    if start[: len(start) - len(start.lstrip())] != start[: (shown[0] if shown else outer).start_point.column]:
        return None  # something else begins in this line, as in code that was packed
    code = _dedented(place.lines[first : last + 1])
    is_defined = body is not None or kind not in RUN
    cuts = tuple(_cuts(body, first)) if body is not None and kind in RUN else ()
    return Symbol(kind, name, first + 1, last + 1, code, doc, is_defined, cuts)


def _kind(node: "Node", place: _Place) -> str | None:
    kind = place.language.kinds.get(node.type)
    if kind is None:
        return None
    if node.type in HOLDS_A_VALUE and _value(node) is node:
        return None
    if place.language is C and not _is_c_declaration(node):
        return None
    if _value(node).type in {"class", "class_expression"}:
        return "class"
    if kind == "function" and place.inside in TYPES - {"namespace"}:
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
    """The type that a method of Go belongs to."""
    receiver = node.child_by_field_name("receiver")
    if receiver is None or not receiver.named_children:
        return ""
    kind = receiver.named_children[0].child_by_field_name("type")
    while kind is not None and kind.type in {"pointer_type", "generic_type", "parenthesized_type"}:
        kind = kind.child_by_field_name("type") or (kind.named_children[0] if kind.named_children else None)
    return _text(kind)


def _value(node: "Node") -> "Node":
    """The function or class that a name is given to, or else the node itself."""
    if node.type not in HOLDS_A_VALUE:
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
    """The name in what C calls a declarator."""
    while declarator is not None and declarator.type not in {"type_identifier", "identifier"}:
        inner = declarator.child_by_field_name("declarator")
        declarator = inner or next((one for one in declarator.named_children), None)
    return declarator


def _of_the_file(root: "Node", language: Language) -> tuple[str, tuple[int, int]]:
    """What stands at the very top and speaks of the file, not of what comes next."""
    if language is PYTHON:
        doc = _docstring(root)
        first = next((one for one in root.named_children if one.type not in COMMENTS), root)
        return doc, (first.start_point.row + 1, _last_row(first) + 1)
    comment = _comment_of_the_file(root, language)
    if not comment:
        return "", (1, 1)
    return comments.comment([_text(one) for one in comment]), (
        comment[0].start_point.row + 1,
        _last_row(comment[-1]) + 1,
    )


def _comment_of_the_file(root: "Node", language: Language) -> "list[Node]":
    nodes = root.named_children
    begin = next((number for number, one in enumerate(nodes) if one.type not in COMMENTS), len(nodes))
    groups: list[list[Node]] = []
    for node in nodes[:begin]:
        if comments.is_licence(_text(node)) or (language is RUST and not _text(node).startswith(("//!", "/*!"))):
            continue
        if groups and node.start_point.row <= _last_row(groups[-1][-1]) + 1:
            groups[-1].append(node)
        else:
            groups.append([node])
    if not groups or language is RUST:
        return [one for group in groups for one in group]
    following = nodes[begin] if begin < len(nodes) else None
    is_apart = following is None or following.start_point.row > _last_row(groups[-1][-1]) + 1
    if language is GO:
        return [] if is_apart else groups[-1]
    of_the_file = len(groups) > 1 or is_apart or (following is not None and following.type in AFTER_THE_BEGINNING)
    return groups[0] if of_the_file else []


def _docstring(body: "Node") -> str:
    first = _doc_node(body)
    if first is None:
        return ""
    return comments.docstring("".join(_text(part) for part in first.named_children if part.type == "string_content"))


def _doc_node(body: "Node") -> "Node | None":
    first = next((one for one in body.named_children if one.type not in COMMENTS), None)
    if first is None or first.type != "expression_statement" or not first.named_children:
        return None
    string = first.named_children[0]
    is_text = string.type == "string" and not any(one.type == "interpolation" for one in string.named_children)
    return string if is_text else None


def _cuts(body: "Node", first: int) -> Iterator[int]:
    """The lines in which statements begin that end with the lines before."""
    doc = _doc_node(body)
    held = body.named_children
    if len(held) == 1 and held[0].type == "statement_list":
        held = held[0].named_children
    statements = [one for one in held if one.type not in COMMENTS and (doc is None or one.start_byte != doc.start_byte)]
    if statements and (_row_before(statements[0], body) < statements[0].start_point.row):
        yield statements[0].start_point.row - first
    for one, following in pairwise(statements):
        if following.start_point.row > _last_row(one):
            yield following.start_point.row - first


def _row_before(statement: "Node", body: "Node") -> int:
    """The row in which what precedes the first statement ends."""
    before = statement.prev_sibling
    if before is not None:
        return _last_row(before)
    outer = body.prev_sibling
    return _last_row(outer) if outer is not None else body.start_point.row


def _last_row(node: "Node") -> int:
    """A line comment may end at the very beginning of the next line."""
    end = node.end_point
    return end.row - 1 if end.column == 0 and end.row > node.start_point.row else end.row


def _dedented(lines: Sequence[str]) -> str:
    """Without the indentation of the first line; text inside may have less."""
    margin = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    return "\n".join(line.removeprefix(margin).rstrip() for line in lines)


def _text(node: "Node | None") -> str:
    return (node.text or b"").decode(errors="replace") if node is not None else ""
