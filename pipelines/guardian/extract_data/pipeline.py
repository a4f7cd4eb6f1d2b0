"""A commit of a repository as samples: what is not kept already is extracted, then all of it is written.

The same commit makes the same samples, whatever was extracted before.
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
from pipelines.guardian.extract_data.cache import COMMIT, Kept, Summary
from pipelines.guardian.extract_data.per_file import Extract
from pipelines.guardian.extract_data.split import Written
from pipelines.guardian.git.objects import Commit, TreeFile
from pipelines.guardian.git.repo import Checkout

BATCH_FILES, BATCH_BYTES = 50, 4_000_000
WORTH_PROCESSES = 300
"""Fewer files are read before other processes have begun."""
READING_SHARE = 0.9
LEAKS_TOLD = 100

Report = Callable[[float, str], None]
"""Hears which part is done, from 0 to 1, and what comes next. Whatever it raises ends the extraction; what was
extracted until then is kept."""


@dataclass(frozen=True)
class Limits:
    held_out: float
    characters: int
    file_bytes: int
    commits: int


@dataclass
class Extracted:
    written: Written = field(default_factory=Written)
    files: int = 0
    commits: int = 0
    extracted: int = 0  # files and commits that were read
    unchanged: int = 0  # those that were not, because they had been before
    skipped: Counter[str] = field(default_factory=Counter[str])
    secrets: Counter[str] = field(default_factory=Counter[str])
    leaks: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    withheld: int = 0  # questions with a secret in them, or in their answers
    seconds: float = 0.0


def extract(
    checkout: Checkout, commit: str, out: Path, cache: Path, limits: Limits, report: Report, processes: int = 1
) -> Extracted:
    """Write train.jsonl and held_out.jsonl into `out`, where there is something to write."""
    began = time.monotonic()
    done = Extracted()
    with extraction_cache.opened(cache, limits.characters) as store:
        wanted = list(_wanted_files(checkout, commit, limits, done))
        commits = list(checkout.log(commit, limits.commits)) if limits.commits else []
        done.commits = len(commits)
        _bring_up_to_date(store, checkout, wanted, commits, limits, done, report, processes)
        report(READING_SHARE, "write")
        summaries = [_counted(one, done) for one in store.summaries()]
        done.written = split.write(store, summaries, commit, out, limits.held_out)
    if done.written.across:
        done.skipped["commit_across_split"] = done.written.across
    done.seconds = round(time.monotonic() - began, 3)
    report(1, "write")
    return done


def _wanted_files(checkout: Checkout, commit: str, limits: Limits, done: Extracted) -> Iterator[TreeFile]:
    for file in checkout.files(commit):
        done.files += 1
        reason = file_filter.skipped_by_path(file.path) or ("too_large" if file.bytes > limits.file_bytes else None)
        if reason is None:
            yield file
        else:
            done.skipped[reason] += 1


def _bring_up_to_date(
    store: Kept,
    checkout: Checkout,
    wanted: Sequence[TreeFile],
    commits: Sequence[Commit],
    limits: Limits,
    done: Extracted,
    report: Report,
    processes: int,
) -> None:
    """Have in the store what this commit has, and nothing else."""
    known = store.blobs()
    changed = [file for file in wanted if known.get(file.path) != file.blob]
    new = [one for one in commits if COMMIT + one.sha not in known]
    store.remove(known.keys() - {file.path for file in wanted} - {COMMIT + one.sha for one in commits})
    done.extracted, total = 0, len(changed) + len(new)
    done.unchanged = len(wanted) + len(commits) - total
    of_files = _of_files(checkout, changed, limits, processes)
    for rows in chain(of_files, _of_commits(checkout, new, limits)):
        report(READING_SHARE * done.extracted / total, "extract")
        store.put(rows)
        done.extracted += len(rows)


def _of_files(
    checkout: Checkout, changed: Sequence[TreeFile], limits: Limits, processes: int
) -> Iterator[list[tuple[str, str, Extract]]]:
    batches = ([(one.path, one.blob, checkout.read(one.blob)) for one in batch] for batch in _batches(changed))
    if processes == 1 or len(changed) < WORTH_PROCESSES:
        yield from (_rows(batch, limits.characters) for batch in batches)
        return
    # Not forked: this process has threads.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        running: set[Future[list[tuple[str, str, Extract]]]] = set()
        try:
            for batch in batches:
                running.add(pool.submit(_rows, batch, limits.characters))
                while len(running) > 2 * processes:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (one.result() for one in finished)
            yield from (one.result() for one in running)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _rows(batch: Sequence[tuple[str, str, bytes]], limit: int) -> list[tuple[str, str, Extract]]:
    return [(path, blob, per_file.of_file(path, content, limit)) for path, blob, content in batch]


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


def _of_commits(checkout: Checkout, new: Sequence[Commit], limits: Limits) -> Iterator[list[tuple[str, str, Extract]]]:
    for start in range(0, len(new), BATCH_FILES):
        yield [
            (COMMIT + one.sha, one.sha, _of_commit(checkout, one, limits)) for one in new[start : start + BATCH_FILES]
        ]


def _of_commit(checkout: Checkout, commit: Commit, limits: Limits) -> Extract:
    if len(commit.parents) > 1:
        return Extract(reason="commit_merges")
    diff = checkout.diff(commit.sha, limits.file_bytes)
    return per_file.of_commit(commit.subject, commit.body, diff, limits.characters)


def _counted(one: Summary, done: Extracted) -> Summary:
    if one.reason is not None:
        done.skipped[one.reason] += 1
    for line, kind in one.leaks:
        done.secrets[kind] += 1
        if len(done.leaks) < LEAKS_TOLD:
            where = {"commit": one.key.removeprefix(COMMIT)} if one.key.startswith(COMMIT) else {"path": one.key}
            done.leaks.append({**where, "line": line, "kind": kind})
    done.withheld += one.withheld
    return one
