"""How fast a large repository becomes samples: the installed source of a big Python package, put under git.

`python -m tests.bench.extraction FOLDER OUT` is one extraction, in a process of its own, whose memory is its own.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipelines.guardian.extract_data import pipeline as extract_data_pipeline
from pipelines.guardian.extract_data.pipeline import Limits
from pipelines.guardian.git.repo import open_folder
from tests.bench.figures import Figure
from tests.support.git_repos import commit_files, git, new_repository

GROUP = "A repository into samples"
PACKAGE = "transformers"
LIMITS = Limits(held_out=0.1, characters=4000, file_bytes=512 * 1024, commits=500)
CHANGED = 3
ROUNDS = 3


def figures() -> list[Figure]:
    """The whole of it, then what a small commit has changed; each in a process that has just begun."""
    folder = Path(tempfile.mkdtemp(prefix="forgearr-extraction-", dir="/tmp"))
    try:
        repository = _repository(folder / "repository")
        rounds = [_round(repository, folder / f"out{number}", number) for number in range(ROUNDS)]
        both = [_run(repository, folder / "both", 2)]
    finally:
        shutil.rmtree(folder)
    first, second = ([one[number] for one in rounds] for number in (0, 1))
    times = [(one["seconds"], two["seconds"]) for one, two in rounds]
    package = f"{PACKAGE}, {first[0]['files']:,} files, {first[0]['samples']:,} samples"
    return [
        _figure("files read, one process", "/s", [one["extracted"] / one["seconds"] for one in first], package),
        _figure("files read, two processes", "/s", [one["extracted"] / one["seconds"] for one in both]),
        _figure("most memory", "MB", [one["memory_mb"] for one in first]),
        _figure("the whole", "s", [one["seconds"] for one in first]),
        Figure(
            group=GROUP,
            name=f"after a commit to {CHANGED} files",
            unit="s",
            ours=_median([two for _, two in times]),
            peer_name="the whole",
            peer=_median([one for one, _ in times]),
            ratio=_median([two / one for one, two in times]),
            rounds=[list(pair) for pair in times],
        ),
        _figure("most memory, after that commit", "MB", [two["memory_mb"] for two in second]),
    ]


def _repository(folder: Path) -> Path:
    found = find_spec(PACKAGE)
    assert found is not None
    assert found.origin is not None
    new_repository(folder)
    shutil.copytree(Path(found.origin).parent, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    commit_files(folder, f"Take {PACKAGE} as it is installed", {})
    return folder


def _round(repository: Path, out: Path, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    first = _run(repository, out)
    changed = git(repository, "ls-files", f"{PACKAGE}/*_utils.py").splitlines()[:CHANGED]
    commit_files(
        repository,
        f"Remark on {CHANGED} files, for the round {number}",
        {path: (repository / path).read_bytes() + f"# round {number}\n".encode() for path in changed},
    )
    second = _run(repository, out)
    assert second["extracted"] == CHANGED + 1, second
    return first, second


def _run(repository: Path, out: Path, processes: int = 1) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.extraction", str(repository), str(out), str(processes)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _figure(name: str, unit: str, values: list[float], note: str = "") -> Figure:
    return Figure(group=GROUP, name=name, unit=unit, ours=_median(values), note=note, rounds=values)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main(repository: Path, out: Path, processes: int) -> None:
    out.mkdir(exist_ok=True)
    with open_folder(repository) as checkout:
        tip = checkout.tip().sha
        done = extract_data_pipeline.extract(checkout, tip, out, out / "cache.sqlite", LIMITS, _unheard, processes)
    told = {
        "seconds": done.seconds,
        "files": done.files,
        "extracted": done.extracted,
        "samples": done.written.by_kind.total(),
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(told))


def _unheard(part: float, phase: str) -> None:
    """Nobody follows how far it is."""


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
