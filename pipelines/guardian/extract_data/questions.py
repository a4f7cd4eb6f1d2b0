"""Build examples: questions about a repository, with answers from the repository itself.

    purpose   what a class, a function or a file is for: its docstring, or the comment above it
    section   what a document says about a topic: a section of Markdown
    code      the code of a class or a function
    where     the file and the lines of a declaration
    complete  the rest of a function, from its beginning
    commit    the commit message of a diff

A question about the same name always has the same wording, and different names have different wordings, so that a model
does not learn one wording only. If several files declare the same name, the question contains the path.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from pipelines.guardian.extract_data.comments import is_licence, shorten
from pipelines.guardian.extract_data.languages import Language
from pipelines.guardian.extract_data.symbols import FileSymbols, Symbol
from pipelines.training.data import documents

PURPOSE: Mapping[bool, tuple[str, ...]] = {
    True: (
        "What does the {kind} `{name}`{place} do?",
        "What is the {kind} `{name}`{place} for?",
        "Explain what `{name}`{place} does.",
    ),
    False: (
        "What is the {kind} `{name}`{place}?",
        "What is the {kind} `{name}`{place} for?",
        "Describe the {kind} `{name}`{place}.",
    ),
}
"""For callables (True), and for all other kinds (False)."""
OF_FILE = ("What is the file `{name}` for?", "What does `{name}` contain?", "Describe the file `{name}`.")
CODE = (
    "Show me the code of the {kind} `{name}`{place}.",
    "How is the {kind} `{name}`{place} implemented?",
    "What does the code of `{name}`{place} look like?",
)
WHERE = ("Where is the {kind} `{name}` defined?", "In which file is `{name}`?", "Where do I find the {kind} `{name}`?")
COMPLETE = "Complete this {kind} from `{path}`:\n\n```{fence}\n{code}\n```"
COMMIT = "Write the commit message for this change:\n\n```diff\n{diff}\n```"
SECTION = (
    "What does `{path}` say about {topic}?",
    "What is written in `{path}` about {topic}?",
    "What does the documentation say about {topic}?",
)

DUNDER = re.compile(r"(?:.*\.)?__\w+__")
MIN_CODE_LINES, MIN_REST_LINES, MIN_REST_CHARACTERS = 3, 2, 30
MAX_TITLE_WORDS = 5
QUESTION_RESERVE = 300
"""The characters that are reserved for the question when an answer is shortened."""
MIN_SECTION_CHARACTERS, MIN_SECTION_WORDS = 40, 6

HTML_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
PICTURE = re.compile(
    r"\[!\[[^\]]*\]\([^)]*\)\]\([^)]*\)|!\[[^\]]*\]\([^)]*\)|</?(?:p|div|img|br|a|h\d|picture|source)\b[^>]*>"
)
LINK = re.compile(r"\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])")
ANCHOR = re.compile(r"\s*\{#[^}]*\}\s*$")
WORD = re.compile(r"[^\W\d_]{2,}")

TRAILER = re.compile(
    r"(?:[A-Z][\w-]+-by|Change-Id|Reviewed-on|git-svn-id|Differential Revision|Pull Request resolved"
    r"|Cc|PiperOrigin-RevId|fbshipit-source-id):? .*",
    re.IGNORECASE,
)
UNINFORMATIVE_SUBJECT = re.compile(
    r"(?:wip|fix|fixes|fixed|fixup!?|squash!?|tmp|temp|test|update|updates|initial commit|first commit|merge|cleanup"
    r"|minor|typo|oops|\.+|save|changes|misc|stuff|bump version|release|v?\d+(?:\.\d+)+\S*)\W*\Z",
    re.IGNORECASE,
)
MERGE = re.compile(r"Merge (?:branch|pull request|remote|tag|commit)\b|(?:fixup|squash|amend)! |Bump .+ from .+ to ")
INDEX = re.compile(r"^index [0-9a-f]+\.\.[0-9a-f]+.*\n", re.MULTILINE)
OMITTED_LINES = "[{number} more lines]\n"
MIN_DIFF_SECTION = 250
MIN_SUBJECT_CHARACTERS, MIN_SUBJECT_WORDS = 12, 3


@dataclass(frozen=True)
class Example:
    kind: str
    question: str
    answer: str
    first: int  # the lines that the answer is from
    last: int
    question_with_path: str | None = None
    """The question to use if several files have the same one. None: the example is then dropped."""


def of_source(path: str, file_symbols: FileSymbols, language: Language, limit: int) -> Iterator[Example]:
    """Examples of a source file. Question and answer together have at most `limit` characters."""
    if file_symbols.doc and (answer := shorten(file_symbols.doc, limit)):
        yield Example("purpose", _choose_phrase(OF_FILE, path).format(name=path), answer, *file_symbols.doc_lines)
    named = sorted(file_symbols.symbols, key=lambda symbol: symbol.name)
    for _, group in groupby(named, key=lambda symbol: symbol.name):
        for example in _of_symbol(path, list(group), language, limit):
            if len(example.question_with_path or example.question) + len(example.answer) <= limit:
                yield example


def of_document(path: str, text: str, limit: int) -> Iterator[Example]:
    """Examples of a Markdown document: one for each section, or for each part of a long section."""
    line = 1
    for headings, section in documents.sections(text):
        body = PICTURE.sub("", HTML_COMMENT.sub("", section)).strip()
        first = text.count("\n", 0, max(text.find(section), 0)) + 1 if section else line
        line, last = first, first + section.count("\n")
        if len(body) < MIN_SECTION_CHARACTERS or len(WORD.findall(body)) < MIN_SECTION_WORDS or is_licence(body):
            continue
        topics = [topic for heading in headings if (topic := _plain_heading(heading))]
        parts = _parts(body, limit - QUESTION_RESERVE)
        for number, part in enumerate(parts, 1):
            part_label = f" (part {number} of {len(parts)})" if len(parts) > 1 else ""
            question, with_path = _section_question(path, topics)
            yield Example("section", question + part_label, part, first, last, with_path + part_label)


def of_commit(subject: str, body: str, sections: Sequence[str], limit: int) -> Example | None:
    """The example of a commit, if its message is informative. `sections` are the parts of its diff, one per file."""
    message = "\n".join(line.rstrip() for line in body.split("\n") if not TRAILER.fullmatch(line.strip())).strip()
    full_message = f"{subject.strip()}\n\n{message}" if message else subject.strip()
    is_short = len(subject) < MIN_SUBJECT_CHARACTERS or len(WORD.findall(subject)) < MIN_SUBJECT_WORDS
    if is_short or UNINFORMATIVE_SUBJECT.match(subject.strip()) or MERGE.match(subject):
        return None
    diff = "".join(_shorten_diff(sections, limit - len(full_message) - len(COMMIT))).strip("\n")
    return Example("commit", COMMIT.format(diff=diff), full_message, 1, 1) if diff else None


def _of_symbol(path: str, symbols: Sequence[Symbol], language: Language, limit: int) -> Iterator[Example]:
    """Examples of one name of a file, with all its declarations there."""
    documented = next((symbol for symbol in symbols if symbol.doc), None)
    if documented is not None and (answer := shorten(documented.doc, limit - QUESTION_RESERVE)):
        phrases = PURPOSE[documented.kind in {"function", "method", "constructor", "macro"}]
        yield _example("purpose", phrases, path, documented, answer)
    defined = [symbol for symbol in symbols if symbol.is_defined]
    if not defined:
        return
    symbol = defined[0]
    code = "\n\n".join(definition.code for definition in defined)
    if code.count("\n") + 1 >= MIN_CODE_LINES:
        example = _example("code", CODE, path, symbol, _fenced(code, language))
        yield Example(
            example.kind, example.question, example.answer, symbol.first, defined[-1].last, example.question_with_path
        )
    if not DUNDER.fullmatch(symbol.name):
        question = _choose_phrase(WHERE, symbol.name).format(kind=symbol.kind, name=symbol.name)
        yield Example("where", question, _location_answer(path, defined), symbol.first, defined[-1].last)
    for definition in defined:
        if (example := _completion(path, definition, language)) is not None:
            yield example


def _example(kind: str, phrases: Sequence[str], path: str, symbol: Symbol, answer: str) -> Example:
    phrase = _choose_phrase(phrases, symbol.name)
    plain, with_path = (
        phrase.format(kind=symbol.kind, name=symbol.name, place=location) for location in ("", f" in `{path}`")
    )
    return Example(kind, plain, answer, symbol.first, symbol.last, with_path)


def _location_answer(path: str, symbols: Sequence[Symbol]) -> str:
    spans = [
        f"lines {symbol.first} to {symbol.last}" if symbol.last > symbol.first else f"line {symbol.first}"
        for symbol in symbols
    ]
    return f"The {symbols[0].kind} `{symbols[0].name}` is in `{path}`, {', '.join(spans)}."


def _completion(path: str, symbol: Symbol, language: Language) -> Example | None:
    """A function up to one of its statements, and the rest as the answer.

    It is cut near its middle. Half of the documented functions are cut before their first statement.
    """
    if not symbol.cuts:
        return None
    lines = symbol.code.split("\n")
    is_whole_body = symbol.doc and _stable_hash(symbol.name) % 2
    cut = symbol.cuts[0] if is_whole_body else min(symbol.cuts, key=lambda line: (abs(2 * line - len(lines)), line))
    rest = "\n".join(lines[cut:])
    if len(lines) - cut < MIN_REST_LINES or len(rest.strip()) < MIN_REST_CHARACTERS:
        return None
    beginning = "\n".join(lines[:cut]).rstrip()
    question = COMPLETE.format(kind=f"{language.name} {symbol.kind}", path=path, fence=language.fence, code=beginning)
    return Example("complete", question, _fenced(rest, language), symbol.first, symbol.last)


def _section_question(path: str, topics: Sequence[str]) -> tuple[str, str]:
    """The question, and the one to use if another document has a section on the same topic."""
    if not topics:
        question = f"What does `{path}` say at its beginning?"
        return question, question
    # The title of a document is left out, because its path says more.
    topic = " / ".join(topics[1:] or topics)
    with_path = SECTION[0].format(path=path, topic=topic)
    if len(topics) == 1 and path.lower().startswith("readme.") and len(topic.split()) <= MAX_TITLE_WORDS:
        return f"What is {topic}?", with_path
    return _choose_phrase(SECTION, f"{path}/{topic}").format(path=path, topic=topic), with_path


def _shorten_diff(sections: Sequence[str], limit: int) -> list[str]:
    """Cut the long sections of a diff so that all fit into `limit`. Empty if too little of each would remain."""
    remaining, shown = limit, dict[int, str]()
    by_length = sorted(range(len(sections)), key=lambda number: len(sections[number]))
    for done, number in enumerate(by_length):
        share = remaining // (len(sections) - done)
        section = INDEX.sub("", sections[number])
        if len(section) > share:
            if share < MIN_DIFF_SECTION:
                return []
            lines = section.split("\n")
            head = section[: share - len(OMITTED_LINES)].split("\n")[:-1]
            section = "\n".join(head) + "\n" + OMITTED_LINES.format(number=len(lines) - len(head))
        shown[number] = section
        remaining -= len(section)
    return [shown[number] for number in range(len(sections))]


def _parts(text: str, limit: int) -> list[str]:
    """Split a text into parts of whole paragraphs and whole code blocks. Only blocks that are too long are split."""
    blocks: list[str] = []
    fence = ""
    for line in text.split("\n"):
        is_continued = bool(fence) or (bool(line.strip()) and bool(blocks) and bool(blocks[-1]))
        fence = documents.next_fence(line, fence)
        if is_continued:
            blocks[-1] += f"\n{line}"
        else:
            blocks.append(line if line.strip() else "")
    parts: list[str] = []
    for piece in (piece for block in blocks if block for piece in _pieces(block, limit)):
        if parts and len(parts[-1]) + len(piece) + 2 <= limit:
            parts[-1] += f"\n\n{piece}"
        else:
            parts.append(piece)
    return parts


def _pieces(block: str, limit: int) -> list[str]:
    """A block, or groups of its lines up to `limit` characters. A longer line is left out."""
    if len(block) <= limit:
        return [block]
    pieces: list[str] = []
    for line in block.split("\n"):
        if pieces and len(pieces[-1]) + len(line) + 1 <= limit:
            pieces[-1] += f"\n{line}"
        elif len(line) <= limit:
            pieces.append(line)
    return pieces


def _plain_heading(heading: str) -> str:
    text = PICTURE.sub("", ANCHOR.sub("", heading))
    return LINK.sub(r"\1", text).replace("**", "").strip().rstrip(":?!.")


def _fenced(code: str, language: Language) -> str:
    fence = "````" if "```" in code else "```"
    return f"{fence}{language.fence}\n{code}\n{fence}"


def _choose_phrase(phrases: Sequence[str], name: str) -> str:
    return phrases[_stable_hash(name) % len(phrases)]


def _stable_hash(name: str) -> int:
    """A hash that is the same in every process and version."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
