"""Questions and answers that are made from source files, documents and commits."""

import re
from textwrap import dedent

import pytest

from pipelines.guardian.extract_data import questions
from pipelines.guardian.extract_data.languages import PYTHON, C, Language
from pipelines.guardian.extract_data.questions import Example
from pipelines.guardian.extract_data.symbols import find

LIMIT = 4000


def examples_of(
    text: str, language: Language = PYTHON, path: str = "store/keep.py", limit: int = LIMIT
) -> list[Example]:
    return list(questions.of_source(path, find(dedent(text).lstrip("\n"), language), language, limit))


def of_kind(kind: str, examples: list[Example]) -> list[Example]:
    return [example for example in examples if example.kind == kind]


SHELF = '''
"""Where things are kept."""


class Shelf:
    """Holds things until somebody asks."""

    def add(self, thing):
        self.things.append(thing)
        self.count += 1
        return self.count
'''


def test_a_class_yields_questions_of_each_kind() -> None:
    examples = examples_of(SHELF)
    purposes = {example.answer: example.question for example in of_kind("purpose", examples)}
    assert purposes.keys() == {"Where things are kept.", "Holds things until somebody asks."}
    assert "`store/keep.py`" in purposes["Where things are kept."]
    assert "`Shelf`" in purposes["Holds things until somebody asks."]
    shelf, add = of_kind("where", examples)
    assert shelf.answer == "The class `Shelf` is in `store/keep.py`, lines 4 to 10."
    assert add.answer == "The method `Shelf.add` is in `store/keep.py`, lines 7 to 10."
    class_code, method = of_kind("code", examples)
    assert class_code.answer.startswith("```python\nclass Shelf:\n")
    assert method.answer.startswith("```python\ndef add(self, thing):\n    self.things.append(thing)\n")
    assert method.answer.endswith("\n    return self.count\n```")
    assert (method.first, method.last) == (7, 10)


def test_a_completion_is_cut_between_two_statements() -> None:
    (example,) = of_kind("complete", examples_of(SHELF))
    start, rest = example.question.split("```python\n")[1].removesuffix("\n```"), example.answer
    completed = start + "\n" + rest.removeprefix("```python\n").removesuffix("\n```")
    assert completed == of_kind("code", examples_of(SHELF))[1].answer.removeprefix("```python\n").removesuffix("\n```")
    assert "store/keep.py" in example.question


def test_undocumented_code_has_no_purpose_question() -> None:
    assert of_kind("purpose", examples_of("def add(one, two):\n    result = one + two\n    return result\n")) == []


def test_the_same_name_gets_the_same_wording() -> None:
    text = 'def keep(thing):\n    """Keeps what it is given."""\n    return thing\n'
    (first,), (second,) = (of_kind("purpose", examples_of(text, path=path)) for path in ("a.py", "b.py"))
    assert first.question == second.question
    assert first.question_with_path != second.question_with_path
    assert "`a.py`" in str(first.question_with_path)


def test_different_names_get_different_wordings() -> None:
    text = "\n\n".join(f'def keep{number}(thing):\n    """Keeps thing number {number}."""' for number in range(30))
    assert len({re.sub(r"keep\d+", "NAME", example.question) for example in of_kind("purpose", examples_of(text))}) == 3


def test_a_name_declared_twice_gets_one_answer() -> None:
    text = """
        class Shelf:
            @property
            def size(self):
                return self._size

            @size.setter
            def size(self, size):
                self._size = size
        """
    (where,) = [example for example in of_kind("where", examples_of(text)) if "size" in example.question]
    assert where.answer == "The method `Shelf.size` is in `store/keep.py`, lines 2 to 4, lines 6 to 8."
    (code,) = [example for example in of_kind("code", examples_of(text)) if "size" in example.question]
    assert "@property" in code.answer
    assert "@size.setter" in code.answer
    assert (code.first, code.last) == (2, 8)


def test_a_declaration_in_a_header_has_only_a_purpose_question() -> None:
    examples = examples_of(
        "/* Makes a point in the plane. */\nstruct point *make(int x,\n  int y,\n  int z);\n", C, "point.h"
    )
    assert [example.kind for example in examples] == ["purpose"]


def test_no_example_is_longer_than_the_limit() -> None:
    body = "\n".join(f"    value = compute({number})" for number in range(60))
    text = f'def long(thing):\n    """Says it.\n\n{"    Says more of it. " * 100}\n    """\n{body}\n'
    assert of_kind("code", examples_of(text))
    short = examples_of(text, limit=800)
    assert all(len(example.question_with_path or example.question) + len(example.answer) <= 800 for example in short)
    assert of_kind("code", short) == []


def test_a_long_purpose_keeps_its_first_paragraphs() -> None:
    text = f'def long(thing):\n    """Says the first thing of all.\n\n    {"More. " * 200}\n    """\n    return thing\n'
    (purpose,) = of_kind("purpose", examples_of(text, limit=800))
    assert purpose.answer == "Says the first thing of all."


def test_code_with_fences_gets_a_longer_fence() -> None:
    text = 'def tell():\n    text = """\n```\ncode\n```\n"""\n    return text\n'
    (code,) = of_kind("code", examples_of(text))
    assert code.answer.startswith("````python\n")
    assert code.answer.endswith("\n````")


DOCUMENT = """\
# Shelves

[![build](https://ci.example/badge.svg)](https://ci.example)

A shelf keeps things until somebody comes and asks for them.

<!-- Copyright 2020 Somebody. All rights reserved. -->

## How to [build](build.md) one {#build}

Take some wood, and then put one piece on top of another:

```sh
# not a heading, but how it is done in a shell

build shelf
```

## Empty

## Short

Yes.
"""


def test_each_section_of_a_document_yields_a_question() -> None:
    intro, build = questions.of_document("README.md", DOCUMENT, LIMIT)
    assert intro.question == "What is Shelves?"
    assert intro.answer == "A shelf keeps things until somebody comes and asks for them."
    assert "How to build one" in build.question
    assert build.question_with_path == "What does `README.md` say about How to build one?"
    assert "not a heading" in build.answer
    assert (build.first, build.last) == (11, 17)


def test_long_sections_are_split_between_paragraphs_and_never_in_code() -> None:
    code = "```sh\n" + "\n\n".join(f"run number {number}" for number in range(10)) + "\n```"
    paragraphs = "\n\n".join(f"Paragraph {number} says that it is one of many paragraphs." for number in range(20))
    parts = list(questions.of_document("docs/long.md", f"# Long\n\n{paragraphs}\n\n{code}\n", 700))
    assert len(parts) > 2
    assert all(len(example.answer) <= 400 for example in parts)
    assert all(example.question.endswith(f"(part {n} of {len(parts)})") for n, example in enumerate(parts, 1))
    assert "\n\n".join(example.answer for example in parts) == f"{paragraphs}\n\n{code}"
    assert sum("```" in example.answer for example in parts) == 1


DIFF = """\
diff --git a/store/keep.py b/store/keep.py
index 0123456..789abcd 100644
--- a/store/keep.py
+++ b/store/keep.py
@@ -1,2 +1,2 @@
-one
+two
"""


def test_a_commit_is_answered_by_its_message() -> None:
    body = "Because one was not enough.\n\nSigned-off-by: Somebody <some@body.example>\nChange-Id: I0123"
    example = questions.of_commit("Keep two things instead of one", body, [DIFF], LIMIT)
    assert example is not None
    assert example.answer == "Keep two things instead of one\n\nBecause one was not enough."
    assert "-one\n+two\n" in example.question
    assert "index 0123456" not in example.question


@pytest.mark.parametrize(
    "subject", ["wip", "Fix.", "fixes #12", "v1.2.3", "Merge branch 'a' into b", "Bump left-pad from 1 to 2", "Fix it"]
)
def test_a_trivial_commit_message_yields_no_example(subject: str) -> None:
    assert questions.of_commit(subject, "", [DIFF], LIMIT) is None


def test_a_long_commit_shows_a_part_of_each_file() -> None:
    long = DIFF + "".join(f"+line number {number}\n" for number in range(500))
    example = questions.of_commit("Keep very many things at once", "", [DIFF, long], 1500)
    assert example is not None
    assert len(example.question) + len(example.answer) <= 1500
    assert example.question.count("+++ b/store/keep.py") == 2
    assert "more lines]" in example.question
    assert "line number 499" not in example.question


def test_a_commit_with_too_many_files_yields_no_example() -> None:
    long = DIFF + "+line\n" * 500
    assert questions.of_commit("Keep very many things at once", "", [long] * 50, 1500) is None
