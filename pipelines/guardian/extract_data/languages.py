"""The programming languages that are parsed: for each, the node types of its tree-sitter grammar that matter.

These are the nodes that declare something, and the containers in which declarations are found.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tree_sitter import Parser


@dataclass(frozen=True)
class Language:
    name: str
    fence: str  # the info string of a Markdown code block
    suffixes: tuple[str, ...]
    grammar: str  # module:function
    kinds: Mapping[str, str] = field(default_factory=dict[str, str])
    """The kind of declaration of each node type."""
    containers: frozenset[str] = frozenset()
    """Unnamed nodes that contain declarations."""
    separator: str = "."


ECMASCRIPT = {
    "function_declaration": "function",
    "generator_function_declaration": "function",
    "class_declaration": "class",
    "method_definition": "method",
    "field_definition": "method",
    "variable_declarator": "function",
    "assignment_expression": "function",
}
ECMASCRIPT_CONTAINERS = frozenset(
    {"export_statement", "expression_statement", "lexical_declaration", "variable_declaration", "class_body"}
)

PYTHON = Language(
    name="Python",
    fence="python",
    suffixes=(".py", ".pyi"),
    grammar="tree_sitter_python:language",
    kinds={"function_definition": "function", "class_definition": "class"},
    containers=frozenset(
        {
            "decorated_definition",
            "block",
            "if_statement",
            "elif_clause",
            "else_clause",
            "try_statement",
            "except_clause",
            "finally_clause",
            "with_statement",
        }
    ),
)
JAVASCRIPT = Language(
    name="JavaScript",
    fence="javascript",
    suffixes=(".js", ".jsx", ".mjs", ".cjs"),
    grammar="tree_sitter_javascript:language",
    kinds=ECMASCRIPT,
    containers=ECMASCRIPT_CONTAINERS,
)
TYPESCRIPT = Language(
    name="TypeScript",
    fence="typescript",
    suffixes=(".ts", ".mts", ".cts"),
    grammar="tree_sitter_typescript:language_typescript",
    kinds={
        **ECMASCRIPT,
        "abstract_class_declaration": "class",
        "public_field_definition": "method",
        "interface_declaration": "interface",
        "type_alias_declaration": "type",
        "enum_declaration": "enum",
        "internal_module": "namespace",
    },
    containers=ECMASCRIPT_CONTAINERS | {"ambient_declaration", "statement_block"},
)
TSX = Language(
    name="TypeScript",
    fence="tsx",
    suffixes=(".tsx",),
    grammar="tree_sitter_typescript:language_tsx",
    kinds=TYPESCRIPT.kinds,
    containers=TYPESCRIPT.containers,
)
GO = Language(
    name="Go",
    fence="go",
    suffixes=(".go",),
    grammar="tree_sitter_go:language",
    kinds={
        "function_declaration": "function",
        "method_declaration": "method",
        "type_spec": "type",
        "type_alias": "type",
    },
    containers=frozenset({"type_declaration"}),
)
RUST = Language(
    name="Rust",
    fence="rust",
    suffixes=(".rs",),
    grammar="tree_sitter_rust:language",
    kinds={
        "function_item": "function",
        "struct_item": "struct",
        "enum_item": "enum",
        "union_item": "union",
        "trait_item": "trait",
        "type_item": "type",
        "macro_definition": "macro",
        "mod_item": "module",
        "impl_item": "implementation",
    },
    containers=frozenset({"declaration_list"}),
    separator="::",
)
JAVA = Language(
    name="Java",
    fence="java",
    suffixes=(".java",),
    grammar="tree_sitter_java:language",
    kinds={
        "class_declaration": "class",
        "interface_declaration": "interface",
        "enum_declaration": "enum",
        "record_declaration": "record",
        "annotation_type_declaration": "annotation",
        "method_declaration": "method",
        "constructor_declaration": "constructor",
    },
    containers=frozenset({"class_body", "interface_body", "enum_body", "enum_body_declarations"}),
)
C = Language(
    name="C",
    fence="c",
    suffixes=(".c", ".h"),
    grammar="tree_sitter_c:language",
    kinds={
        "function_definition": "function",
        "declaration": "function",
        "struct_specifier": "struct",
        "union_specifier": "union",
        "enum_specifier": "enum",
        "type_definition": "type",
        "preproc_function_def": "macro",
    },
    containers=frozenset(
        {
            "preproc_ifdef",
            "preproc_if",
            "preproc_else",
            "preproc_elif",
            "preproc_elifdef",
            "linkage_specification",
            "declaration_list",
        }
    ),
)

LANGUAGES = (PYTHON, JAVASCRIPT, TYPESCRIPT, TSX, GO, RUST, JAVA, C)
PACKAGES = tuple(sorted({language.grammar.partition(":")[0].replace("_", "-") for language in LANGUAGES}))

_by_suffix = {suffix: language for language in LANGUAGES for suffix in language.suffixes}


def language_of(path: str) -> Language | None:
    name, dot, suffix = path.lower().rpartition(".")
    return _by_suffix.get(dot + suffix) if name and not name.endswith("/") else None


@cache
def parser_of(grammar: str) -> "Parser":
    """Cached for each process, because creating a parser costs more than using it."""
    import tree_sitter

    module, _, function = grammar.partition(":")
    pointer: object = getattr(import_module(module), function)()
    return tree_sitter.Parser(tree_sitter.Language(pointer))
