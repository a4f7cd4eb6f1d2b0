"""Select the files of a repository to train on, by path, encoding and content, with a reason for each skipped file."""

import re

from pipelines.guardian.extract_data.languages import language_of
from pipelines.training.data.documents import MARKDOWN_EXTENSIONS

MARKDOWN_SUFFIXES = tuple(sorted(MARKDOWN_EXTENSIONS))

THIRD_PARTY_FOLDERS = {
    "node_modules",
    "bower_components",
    "site-packages",
    "vendor",
    "vendored",
    "_vendor",
    "third_party",
    "third-party",
    "thirdparty",
    "3rdparty",
    "external",
    "extern",
    "godeps",
    "pods",
    ".venv",
    "venv",
    ".tox",
    "__pycache__",
}
"""Folders of third-party code."""

LOCK_FILES = {"composer.lock", "cargo.lock", "gemfile.lock", "poetry.lock", "uv.lock", "pdm.lock", "go.sum"} | {
    "package-lock.json",
    "npm-shrinkwrap.json",
    "pipfile.lock",
    "yarn.lock",
    "pnpm-lock.yaml",
    "bun.lock",
    "flake.lock",
}
LICENCES = re.compile(r"(?:licen[cs]es?|copying|notice|copyright|third[-_ ]?party.*)(?:[-_.][\w.-]+)?", re.IGNORECASE)
GENERATED_NAMES = re.compile(
    r".*(?:_pb2(?:_grpc)?\.pyi?|\.pb\.go|\.pb\.[ch]|_pb\.[jt]s|_generated\.\w+|\.generated\.\w+|\.g\.\w+|_gen\.go|\.d\.ts\.map)"
    r"|zz_generated.*",
    re.IGNORECASE,
)
MINIFIED_NAMES = re.compile(r".*[.-]min\.(?:js|mjs|cjs|css)|.*\.bundle\.js|.*\.map", re.IGNORECASE)
GENERATED_FOLDERS = {"dist", "generated", "__generated__"}

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
GENERATED_MARK = re.compile(
    r"^\s*(?:#|//|/?\*|--|<!--|%|;|\"\"\").*(?:@generated\b|\bcode generated\b|\bdo not (?:edit|modify)\b"
    r"|\bauto-?matically generated\b|\bauto-?generated\b|\bgenerated (?:automatically|by)\b"
    r"|\bthis file (?:is|was) generated\b)",
    re.IGNORECASE | re.MULTILINE,
)
"""The marks at the beginning of generated files."""
HEAD_LINES = 20
MAX_LINE_LENGTH, MAX_AVERAGE_LINE_LENGTH = 5000, 250
"""A file with a longer line, or with longer lines on average, is minified."""

CPP_SYNTAX = re.compile(
    r"^\s*(?:class\s+\w+|namespace\b|template\s*<|public:|private:|protected:|using\s+\w+|constexpr\b)|\bstd::|@interface\b",
    re.MULTILINE,
)


def is_markdown(path: str) -> bool:
    return path.lower().endswith(MARKDOWN_SUFFIXES)


def skip_reason_by_path(path: str) -> str | None:
    """The reason to skip a file because of its path, if there is one."""
    *parents, name = path.lower().split("/")
    folders = set(parents)
    if folders & THIRD_PARTY_FOLDERS:
        return "foreign"
    if name in LOCK_FILES:
        return "lock"
    if MINIFIED_NAMES.fullmatch(name):
        return "minified"
    if GENERATED_NAMES.fullmatch(name) or folders & GENERATED_FOLDERS:
        return "generated"
    if LICENCES.fullmatch(name.rpartition(".")[0] or name) and (is_markdown(path) or language_of(path) is None):
        return "licence"
    if language_of(path) is None and not is_markdown(path):
        return "other_kind"
    return None


def decode_text(content: bytes) -> tuple[str, str | None]:
    """The text of a file, and the reason to skip it, if there is one."""
    if content.startswith(LFS_POINTER):
        return "", "lfs_pointer"
    if b"\0" in content:
        return "", "binary"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "", "invalid_utf8"
    return text.replace("\r\n", "\n").replace("\r", "\n"), None


def skip_reason_by_text(path: str, text: str) -> str | None:
    """The reason to skip a file because of its text, if there is one."""
    lines = text.split("\n")
    if GENERATED_MARK.search("\n".join(line[:500] for line in lines[:HEAD_LINES])):
        return "generated"
    if is_markdown(path):
        return None
    if max(map(len, lines)) > MAX_LINE_LENGTH or len(text) > MAX_AVERAGE_LINE_LENGTH * len(lines):
        return "minified"
    if path.lower().endswith(".h") and CPP_SYNTAX.search(text):
        return "other_kind"
    return None
