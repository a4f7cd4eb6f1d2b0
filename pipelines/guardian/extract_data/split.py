"""Write the examples of a repository as two files of samples: for training and held out.

Whole files are held out, always the same ones, selected by a hash of their paths. A held-out answer does not occur in
the training samples, and a commit that changes a held-out file is not trained on.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipelines.guardian.extract_data.cache import COMMIT_PREFIX, ExtractCache, PreparedExample, Summary
from pipelines.training.data.content import SampleFile

BEGIN, END = b'{"messages":[{"role":"user","content":', b'"}}\n'

UNIQUE_ANSWER_KINDS = frozenset({"code", "complete", "section", "commit"})
"""Kinds whose answers are used only once, even if the repository has them several times."""

Side = Literal["train", "held_out"]


@dataclass
class SplitResult:
    train: SampleFile | None = None
    held_out: SampleFile | None = None
    duplicates: int = 0  # also ambiguous questions without a variant with their path
    crossing_commits: int = 0  # dropped, because they change files of both sides
    by_kind: Counter[str] = field(default_factory=Counter[str])
    by_language: Counter[str] = field(default_factory=Counter[str])


def write(store: ExtractCache, summaries: Sequence[Summary], commit: str, out: Path, share: float) -> SplitResult:
    """Write train.jsonl and held_out.jsonl into `out`."""
    with_examples = [summary for summary in summaries if summary.kinds]
    held_files = choose_held_out(
        (summary.key for summary in with_examples if not summary.key.startswith(COMMIT_PREFIX)), share
    )
    sides: dict[str, Side | None] = {summary.key: _side(summary, held_files, share) for summary in with_examples}
    seen = _Deduplicator(_ambiguous_questions(summary for summary in with_examples if sides[summary.key] is not None))
    written = SplitResult(crossing_commits=sum(side is None for side in sides.values()))

    def of_side(side: Side) -> Iterator[list[bytes]]:
        for summary in with_examples:
            if sides[summary.key] == side:
                yield list(_lines(summary, store.examples(summary.key), commit, seen, written))

    # The held-out file is written first, so that it does not depend on the training samples.
    written.held_out = _write_file(out / "held_out.jsonl", of_side("held_out"))
    seen.held_answers, seen.answers = seen.answers, set()
    written.train = _write_file(out / "train.jsonl", of_side("train"))
    return written


def choose_held_out(paths: Iterable[str], share: float) -> set[str]:
    """Select the files to hold out by a hash of their paths, so that they are the same every time.

    If there are two files or more, both sides get at least one.
    """
    ranked = sorted((_hash_fraction(path), path) for path in paths)
    chosen = {path for fraction, path in ranked if fraction < share}
    if share and len(ranked) > 1:
        chosen = (chosen or {ranked[0][1]}) - ({ranked[-1][1]} if len(chosen) == len(ranked) else set[str]())
    return chosen


@dataclass
class _Deduplicator:
    """The hashes of the questions and answers that were written, and of the ambiguous questions."""

    ambiguous_questions: set[int]
    questions: set[int] = field(default_factory=set[int])
    answers: set[int] = field(default_factory=set[int])
    held_answers: set[int] = field(default_factory=set[int])

    def is_new(self, kind: str, question_hash: int, answer_hash: int) -> bool:
        if (
            question_hash in self.questions
            or answer_hash in self.held_answers
            or (kind in UNIQUE_ANSWER_KINDS and answer_hash in self.answers)
        ):
            return False
        self.questions.add(question_hash)
        self.answers.add(answer_hash)
        return True


def _lines(
    summary: Summary, examples: Iterable[PreparedExample], commit: str, seen: _Deduplicator, written: SplitResult
) -> Iterator[bytes]:
    end = (summary.key.removeprefix(COMMIT_PREFIX) if summary.key.startswith(COMMIT_PREFIX) else commit).encode() + END
    for kind, question_hash, with_path_hash, answer_hash, question, with_path, rest in examples:
        if question_hash in seen.ambiguous_questions:
            question_hash, question = with_path_hash, with_path
        if not question or not seen.is_new(kind, question_hash, answer_hash):
            written.duplicates += 1
            continue
        written.by_kind[kind] += 1
        if summary.language:
            written.by_language[summary.language] += 1
        yield b"".join((BEGIN, question, rest, end))


def _write_file(path: Path, chunks: Iterable[list[bytes]]) -> SampleFile | None:
    digest, count = hashlib.sha256(), 0
    with path.open("wb") as file:
        for lines in chunks:
            chunk = b"".join(lines)
            digest.update(chunk)
            file.write(chunk)
            count += len(lines)
    return SampleFile(path, "chat", digest.hexdigest(), count, path.stat().st_size) if count else None


def _side(summary: Summary, held_files: set[str], share: float) -> Side | None:
    """The side of a file or commit. None for a commit that is not held out, but changes held-out files."""
    if not summary.key.startswith(COMMIT_PREFIX):
        return "held_out" if summary.key in held_files else "train"
    if _hash_fraction(summary.key) < share:
        return "held_out"
    return "train" if held_files.isdisjoint(summary.paths) else None


def _ambiguous_questions(summaries: Iterable[Summary]) -> set[int]:
    """The hashes of questions that several files have."""
    seen_once, seen_twice = set[int](), set[int]()
    for summary in summaries:
        hashes = set(summary.question_hashes)
        seen_twice |= seen_once & hashes
        seen_once |= hashes
    return seen_twice


def _hash_fraction(name: str) -> float:
    """A number from 0 to 1 that is the same for this name in every process and version."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
