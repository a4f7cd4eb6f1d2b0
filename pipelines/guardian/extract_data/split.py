"""The examples of a repository as two files of samples: what is learned, and what is held out to ask about.

Whole files are held out, always the same ones: their paths say which. An answer that is held out is nowhere in what is
learned, and a change that touches a file that is held out is not learned either.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipelines.guardian.extract_data.cache import COMMIT, Kept, Prepared, Summary
from pipelines.training.data.content import Content

BEGIN, END = b'{"messages":[{"role":"user","content":', b'"}}\n'

ONCE = frozenset({"code", "complete", "section", "commit"})
"""Kinds whose answers are learned once, however often the repository has them."""

Side = Literal["train", "held_out"]


@dataclass
class Written:
    train: Content | None = None
    held_out: Content | None = None
    duplicates: int = 0  # and questions that several files would answer
    across: int = 0  # changes that touch files of both sides
    by_kind: Counter[str] = field(default_factory=Counter[str])
    by_language: Counter[str] = field(default_factory=Counter[str])


def write(store: Kept, summaries: Sequence[Summary], commit: str, out: Path, share: float) -> Written:
    """Write train.jsonl and held_out.jsonl into `out`, as far as there is something to write."""
    told = [one for one in summaries if one.kinds]
    held_files = held_out_of((one.key for one in told if not one.key.startswith(COMMIT)), share)
    sides: dict[str, Side | None] = {one.key: _side(one, held_files, share) for one in told}
    seen = _Seen(_asked_twice(one for one in told if sides[one.key] is not None))
    written = Written(across=sum(side is None for side in sides.values()))

    def of_side(side: Side) -> Iterator[list[bytes]]:
        for one in told:
            if sides[one.key] == side:
                yield list(_lines(one, store.examples(one.key), commit, seen, written))

    # What is held out goes first: it is the same, whatever else there is to learn.
    written.held_out = _content(out / "held_out.jsonl", of_side("held_out"))
    seen.held_answers, seen.answers = seen.answers, set()
    written.train = _content(out / "train.jsonl", of_side("train"))
    return written


def held_out_of(paths: Iterable[str], share: float) -> set[str]:
    """The files that are held out: by their paths, so that they are the same ones every time.

    At least one is, and at least one is not, when there are two.
    """
    placed = sorted((_place(path), path) for path in paths)
    chosen = {path for place, path in placed if place < share}
    if share and len(placed) > 1:
        chosen = (chosen or {placed[0][1]}) - ({placed[-1][1]} if len(chosen) == len(placed) else set[str]())
    return chosen


@dataclass
class _Seen:
    """What was written, and what several files would be asked; by their numbers."""

    asked_twice: set[int]
    questions: set[int] = field(default_factory=set[int])
    answers: set[int] = field(default_factory=set[int])
    held_answers: set[int] = field(default_factory=set[int])

    def is_new(self, kind: str, asked: int, answered: int) -> bool:
        if asked in self.questions or answered in self.held_answers or (kind in ONCE and answered in self.answers):
            return False
        self.questions.add(asked)
        self.answers.add(answered)
        return True


def _lines(one: Summary, examples: Iterable[Prepared], commit: str, seen: _Seen, written: Written) -> Iterator[bytes]:
    end = (one.key.removeprefix(COMMIT) if one.key.startswith(COMMIT) else commit).encode() + END
    for kind, asked, exactly_asked, answered, question, exact, rest in examples:
        if asked in seen.asked_twice:
            asked, question = exactly_asked, exact
        if not question or not seen.is_new(kind, asked, answered):
            written.duplicates += 1
            continue
        written.by_kind[kind] += 1
        if one.language:
            written.by_language[one.language] += 1
        yield b"".join((BEGIN, question, rest, end))


def _content(path: Path, chunks: Iterable[list[bytes]]) -> Content | None:
    digest, count = hashlib.sha256(), 0
    with path.open("wb") as file:
        for lines in chunks:
            chunk = b"".join(lines)
            digest.update(chunk)
            file.write(chunk)
            count += len(lines)
    return Content(path, "chat", digest.hexdigest(), count, path.stat().st_size) if count else None


def _side(one: Summary, held_files: set[str], share: float) -> Side | None:
    """None for a change that is not to be learned, because of what is held out, and not held out itself."""
    if not one.key.startswith(COMMIT):
        return "held_out" if one.key in held_files else "train"
    if _place(one.key) < share:
        return "held_out"
    return "train" if held_files.isdisjoint(one.paths) else None


def _asked_twice(told: Iterable[Summary]) -> set[int]:
    """The questions that more than one file would answer."""
    once, twice = set[int](), set[int]()
    for one in told:
        numbers = set(one.asked)
        twice |= once & numbers
        once |= numbers
    return twice


def _place(name: str) -> float:
    """From 0 to 1, the same for the same name, always and everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
