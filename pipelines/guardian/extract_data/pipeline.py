"""Extract the samples of a commit: read the files that are not cached, then write all examples.

The same commit always gives the same samples, whatever the cache contains.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pipelines.guardian.extract_data import cache as extraction_cache
from pipelines.guardian.extract_data import file_filter, per_file, split
from pipelines.guardian.extract_data.cache import COMMIT_PREFIX, ExtractCache, Summary
from pipelines.guardian.extract_data.per_file import Extract
from pipelines.guardian.extract_data.split import SplitResult
from pipelines.guardian.git.objects import Commit, TreeFile
from pipelines.guardian.git.repo import RepoReader

BATCH_FILES, BATCH_BYTES = 50, 4_000_000
MIN_PARALLEL_FILES = 300
"""With fewer files, starting other processes takes longer than reading."""
READING_SHARE = 0.9
MAX_REPORTED_LEAKS = 100

Report = Callable[[float, str], None]
"""Receives the fraction that is done, from 0 to 1, and the current phase. An exception ends the extraction; what was
extracted until then is cached."""


@dataclass(frozen=True)
class Limits:
    held_out: float
    characters: int
    file_bytes: int
    commits: int


@dataclass
class ExtractionResult:
    written: SplitResult = field(default_factory=SplitResult)
    files: int = 0
    commits: int = 0
    extracted: int = 0  # files and commits that were read
    unchanged: int = 0  # files and commits that were cached
    skipped: Counter[str] = field(default_factory=Counter[str])
    secrets: Counter[str] = field(default_factory=Counter[str])
    leaks: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    withheld: int = 0  # examples that contain a secret
    seconds: float = 0.0


def extract(
    reader: RepoReader, commit: str, out: Path, cache: Path, limits: Limits, report: Report, processes: int = 1
) -> ExtractionResult:
    """Write train.jsonl and held_out.jsonl into `out`."""
    started_at = time.monotonic()
    result = ExtractionResult()
    with extraction_cache.open_cache(cache, limits.characters) as store:
        selected = list(_select_files(reader, commit, limits, result))
        commits = list(reader.log(commit, limits.commits)) if limits.commits else []
        result.commits = len(commits)
        _update_store(store, reader, selected, commits, limits, result, report, processes)
        report(READING_SHARE, "write")
        summaries = [_add_counts(summary, result) for summary in store.summaries()]
        result.written = split.write(store, summaries, commit, out, limits.held_out)
    if result.written.crossing_commits:
        result.skipped["commit_across_split"] = result.written.crossing_commits
    result.seconds = round(time.monotonic() - started_at, 3)
    report(1, "write")
    return result


def _select_files(reader: RepoReader, commit: str, limits: Limits, result: ExtractionResult) -> Iterator[TreeFile]:
    for file in reader.files(commit):
        result.files += 1
        reason = file_filter.skip_reason_by_path(file.path) or ("too_large" if file.bytes > limits.file_bytes else None)
        if reason is None:
            yield file
        else:
            result.skipped[reason] += 1


def _update_store(
    store: ExtractCache,
    reader: RepoReader,
    selected: Sequence[TreeFile],
    commits: Sequence[Commit],
    limits: Limits,
    result: ExtractionResult,
    report: Report,
    processes: int,
) -> None:
    """Make the cache contain exactly the files and commits of this commit."""
    known = store.blobs()
    changed = [file for file in selected if known.get(file.path) != file.blob]
    new = [commit for commit in commits if COMMIT_PREFIX + commit.sha not in known]
    store.remove(known.keys() - {file.path for file in selected} - {COMMIT_PREFIX + commit.sha for commit in commits})
    result.extracted, total = 0, len(changed) + len(new)
    result.unchanged = len(selected) + len(commits) - total
    of_files = _extract_files(reader, changed, limits, processes)
    for rows in chain(of_files, _extract_commits(reader, new, limits)):
        report(READING_SHARE * result.extracted / total, "extract")
        store.put(rows)
        result.extracted += len(rows)


def _extract_files(
    reader: RepoReader, changed: Sequence[TreeFile], limits: Limits, processes: int
) -> Iterator[list[tuple[str, str, Extract]]]:
    batches = ([(item.path, item.blob, reader.read(item.blob)) for item in batch] for batch in _batches(changed))
    if processes == 1 or len(changed) < MIN_PARALLEL_FILES:
        yield from (_extract_batch(batch, limits.characters) for batch in batches)
        return
    # Not forked: this process has threads.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        running: set[Future[list[tuple[str, str, Extract]]]] = set()
        try:
            for batch in batches:
                running.add(pool.submit(_extract_batch, batch, limits.characters))
                while len(running) > 2 * processes:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (item.result() for item in finished)
            yield from (item.result() for item in running)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _extract_batch(batch: Sequence[tuple[str, str, bytes]], limit: int) -> list[tuple[str, str, Extract]]:
    return [(path, blob, per_file.extract_file(path, content, limit)) for path, blob, content in batch]


def _batches(changed: Sequence[TreeFile]) -> Iterator[list[TreeFile]]:
    batch: list[TreeFile] = []
    size = 0
    for file in changed:
        if batch and (len(batch) == BATCH_FILES or size + file.bytes > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(file)
        size += file.bytes
    if batch:
        yield batch


def _extract_commits(
    reader: RepoReader, new: Sequence[Commit], limits: Limits
) -> Iterator[list[tuple[str, str, Extract]]]:
    for start in range(0, len(new), BATCH_FILES):
        yield [
            (COMMIT_PREFIX + commit.sha, commit.sha, _extract_commit(reader, commit, limits))
            for commit in new[start : start + BATCH_FILES]
        ]


def _extract_commit(reader: RepoReader, commit: Commit, limits: Limits) -> Extract:
    if len(commit.parents) > 1:
        return Extract(reason="commit_merges")
    diff = reader.diff(commit.sha, limits.file_bytes)
    return per_file.extract_commit(commit.subject, commit.body, diff, limits.characters)


def _add_counts(summary: Summary, result: ExtractionResult) -> Summary:
    if summary.reason is not None:
        result.skipped[summary.reason] += 1
    for line, kind in summary.leaks:
        result.secrets[kind] += 1
        if len(result.leaks) < MAX_REPORTED_LEAKS:
            location = (
                {"commit": summary.key.removeprefix(COMMIT_PREFIX)}
                if summary.key.startswith(COMMIT_PREFIX)
                else {"path": summary.key}
            )
            result.leaks.append({**location, "line": line, "kind": kind})
    result.withheld += summary.withheld
    return summary
