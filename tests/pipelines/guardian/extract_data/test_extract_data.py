"""Extraction from real repositories: the training split, the held-out split, and what is in neither."""

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from cluster.db import Database
from cluster.settings import get_settings
from jobs.context import Context, StopJob
from jobs.leases import Claim
from pipelines.guardian.extract_data import cache as extraction_cache
from pipelines.guardian.extract_data import pipeline as extract_data_pipeline
from pipelines.guardian.extract_data import split
from pipelines.guardian.extract_data.job import ExtractSpec, NothingToExtract, extract_data
from pipelines.guardian.extract_data.pipeline import ExtractionResult, Limits, Report
from pipelines.guardian.git.repo import RepoReader, open_folder
from pipelines.guardian.repositories import Repository
from pipelines.training.data import datasets
from pipelines.training.data.datasets import Dataset
from pipelines.training.data.parsing import parse_samples, to_json_line
from tests.support.git_repos import commit_files, git, new_repository
from tests.support.recording_link import RecordingLink

LIMITS = Limits(held_out=0.2, characters=4000, file_bytes=100_000, commits=100)
AWS_KEY, PASSWORD, TOKEN = (
    "AKIA" + "Q3EGSNPL5NHYD2K7",
    "hunter2-is-not-it",
    "ghp_" + "x8Kd03jfM2qPz7vTbN4sLw9RcY6hAe1uGo5i",
)

Sample = dict[str, Any]
Extract = Callable[..., ExtractionResult]


def module(name: str, extra: str = "") -> str:
    return f'''"""Everything about {name}s."""


def make_{name}(size):
    """Makes a {name} of this size."""
    {name} = allocate("{name}", size)
    {name}.fill(size)
    return {name}
{extra}'''


NAMES = ("apple", "bench", "cloud", "dress", "eagle", "fence", "grape", "house", "igloo", "jewel", "kayak", "lemon")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # A commit's hash decides whether it is held out, and its date is part of the hash: fixed dates fix the split.
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_DATE", "2026-01-01T12:00:00Z")
    folder = new_repository(tmp_path / "repository")
    commit_files(folder, "Begin with all of the modules", {f"src/{name}.py": module(name) for name in NAMES})
    return folder


def check_report(part: float, phase: str) -> None:
    assert 0 <= part <= 1
    assert phase


@pytest.fixture
def extract(folder: Path, tmp_path: Path) -> Extract:
    def run(
        limits: Limits = LIMITS, cache: str = "cache.sqlite", report: Report = check_report, processes: int = 1
    ) -> ExtractionResult:
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        with open_folder(folder) as checkout:
            return extract_data_pipeline.extract(
                checkout, checkout.tip().sha, out, tmp_path / cache, limits, report, processes
            )

    return run


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of all blobs that are read from now on."""
    read: list[str] = []
    original = RepoReader.read

    def record(checkout: RepoReader, blob: str) -> bytes:
        read.append(blob)
        return original(checkout, blob)

    monkeypatch.setattr(RepoReader, "read", record)
    return read


def samples(result: ExtractionResult) -> tuple[list[Sample], list[Sample]]:
    train, held_out = result.written.train, result.written.held_out
    return (_read(train.path) if train else []), (_read(held_out.path) if held_out else [])


def everything(result: ExtractionResult) -> list[Sample]:
    train, held_out = samples(result)
    return train + held_out


def answer(sample: Sample) -> str:
    return sample["messages"][1]["content"]


def question(sample: Sample) -> str:
    return sample["messages"][0]["content"]


def paths(extracted: list[Sample]) -> set[str]:
    return {sample["source"]["path"] for sample in extracted if "path" in sample["source"]}


def _read(path: Path) -> list[Sample]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_line_is_a_sample_in_canonical_form(extract: Extract, folder: Path) -> None:
    result = extract()
    assert result.written.train is not None
    lines = result.written.train.path.read_bytes().splitlines(keepends=True)
    assert len(lines) == result.written.train.samples
    assert [to_json_line(sample) for sample in parse_samples(lines, "test")] == lines
    head = git(folder, "rev-parse", "HEAD")
    assert {json.loads(line)["source"]["commit"] for line in lines} == {head}


def test_the_source_of_a_code_sample_names_its_lines(extract: Extract, folder: Path) -> None:
    for sample in everything(extract()):
        source = sample["source"]
        if source["kind"] != "code":
            continue
        first, last = source["lines"]
        lines = (folder / source["path"]).read_text().split("\n")[first - 1 : last]
        assert answer(sample) == "```python\n" + "\n".join(lines) + "\n```"


def test_a_file_is_on_one_side_of_the_split(extract: Extract) -> None:
    train, held_out = samples(extract())
    assert paths(train) | paths(held_out) == {f"src/{name}.py" for name in NAMES}
    assert paths(train).isdisjoint(paths(held_out))
    assert paths(held_out)


def test_held_out_files_stay_held_out_when_files_are_added(extract: Extract, folder: Path) -> None:
    _, before = samples(extract())
    commit_files(folder, "Add some more of the modules", {f"src/new{name}.py": module(f"new{name}") for name in NAMES})
    train, after = samples(extract())
    assert paths(before) <= paths(after)
    assert paths(before).isdisjoint(paths(train))


def test_held_out_content_is_not_in_the_training_split(extract: Extract, folder: Path) -> None:
    """Copies of a held-out file, and the commits that made them, would leak it."""
    _, before = samples(extract())
    held_out_path = sorted(paths(before))[0]
    copies: dict[str, str | bytes] = {
        f"copies/{number}/{Path(held_out_path).name}": (folder / held_out_path).read_text() for number in range(10)
    }
    commit_files(folder, "Copy a module to ten places", copies)
    text = (folder / held_out_path).read_text()
    commit_files(folder, "Change what is held out a bit", {held_out_path: text.replace("fill", "fill_up")})
    result = extract()
    train, held_out = samples(result)
    held_answers = {answer(sample) for sample in held_out}
    assert any(held_out_path in (sample["source"].get("path") or "") for sample in held_out)
    assert held_answers.isdisjoint(answer(sample) for sample in train)
    assert not [
        sample
        for sample in train
        if sample["source"]["kind"] == "commit" and f"b/{held_out_path}" in sample["messages"][0]["content"]
    ]
    assert result.skipped["commit_across_split"] >= 1


def test_questions_are_unique_and_name_the_file_where_necessary(extract: Extract, folder: Path) -> None:
    start = 'def start():\n    """Starts the engine of {0}."""\n    engine = {0}()\n    return engine\n'
    commit_files(folder, "Add two functions of one name", {f"src/{name}.py": start.format(name) for name in "ab"})
    extracted = everything(extract())
    assert len({question(sample) for sample in extracted}) == len(extracted)
    for kind, answers in (("purpose", "Starts the engine"), ("code", "def start")):
        matching = [sample for sample in extracted if sample["source"]["kind"] == kind and answers in answer(sample)]
        assert len(matching) == 2
        assert all(f"`{sample['source']['path']}`" in question(sample) for sample in matching)
    # A question about the location would contain the answer.
    assert not [sample for sample in extracted if sample["source"]["kind"] == "where" and "`start`" in answer(sample)]


def test_a_repository_with_one_file_has_no_held_out_split(tmp_path: Path) -> None:
    folder = new_repository(tmp_path / "one")
    commit_files(folder, "wip", {"only.py": module("only")})
    with open_folder(folder) as checkout:
        result = extract_data_pipeline.extract(
            checkout, checkout.tip().sha, tmp_path, tmp_path / "cache", LIMITS, check_report
        )
    assert result.written.train is not None
    assert result.written.held_out is None


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_one_of_two_files_is_held_out_whatever_the_share(share: float) -> None:
    for number in range(50):
        assert len(split.choose_held_out([f"a{number}", f"b{number}"], share)) == 1
    assert split.choose_held_out(["a", "b"], 0) == set()


def test_secrets_are_in_no_sample_report_or_cache(extract: Extract, folder: Path, tmp_path: Path) -> None:
    secret = f'\n\ndef connect():\n    key = "{AWS_KEY}"\n    client = open_client(key)\n    return client\n'
    documented = f'\n\ndef login():\n    """Logs in by {PASSWORD} as all do."""\n    password = "{PASSWORD}"\n'
    guide = f"# Guide\n\nUse this key for all that you do here:\n\n```sh\nexport API_KEY={TOKEN}\n```\n"
    files: dict[str, str | bytes] = {
        "src/apple.py": module("apple", secret),
        "src/bench.py": module("bench", documented),
        "docs/guide.md": guide,
        "certificates.md": f"# Certificates\n\nThis is the key that everybody uses here:\n\n{PRIVATE_KEY}\n",
    }
    commit_files(folder, f"Connect by the token {TOKEN} for now", files)
    result = extract()
    assert {"AWS Access Key", "Secret Keyword", "GitHub Token", "Private Key"} <= result.secrets.keys()
    assert {leak.get("path") for leak in result.leaks} >= files.keys()
    line = module("apple", secret).split("\n").index(f'    key = "{AWS_KEY}"') + 1
    assert {"path": "src/apple.py", "line": line, "kind": "AWS Access Key"} in result.leaks
    output = json.dumps(everything(result)) + json.dumps(result.leaks) + repr(result)
    stored = (tmp_path / "cache.sqlite").read_bytes()
    for value in (AWS_KEY, PASSWORD, TOKEN, "MIIEpAIBAAKCAQEA"):
        assert value not in output
        assert value.encode() not in stored
    # Samples without a secret are still extracted.
    assert any("def make_apple" in answer(sample) for sample in everything(result))
    assert any("`connect`" in question(sample) for sample in everything(result))


PRIVATE_KEY = """-----BEGIN RSA PRIVATE KEY-----
MIIEpAIBAAKCAQEAx
AbCdEfGhIjKl
-----END RSA PRIVATE KEY-----"""


FILES: dict[str, tuple[str, str | bytes]] = {
    "lfs_pointer": ("src/data.py", "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12\n"),
    "binary": ("src/image.py", b"\x00\x01\x02 def hidden(): pass"),
    "invalid_utf8": ("src/latin.py", 'def hidden():\n    """Sagt schöne Dinge auf."""\n    pass\n'.encode("latin-1")),
    "generated": ("src/made.py", "# Code generated by protoc. DO NOT EDIT.\n" + module("hidden")),
    "minified": ("src/app.js", "function hidden(a){" + "a=a+1;" * 1000 + "}"),
    "too_large": ("src/large.py", module("hidden") + "# long\n" * 20_000),
    "foreign": (
        "node_modules/left/index.js",
        "/** Pads what is on the left. */\nfunction hidden() {\n  return 1;\n}\n",
    ),
    "lock": ("package-lock.json", '{"hidden": 1}'),
    "licence": ("LICENSE.md", "# License\n\nPermission is hereby granted, free of charge, to any hidden person.\n"),
    "other_kind": ("src/hidden.bin", "def hidden(): pass"),
}


@pytest.mark.parametrize("reason", FILES)
def test_unsuitable_files_are_skipped_and_counted(extract: Extract, folder: Path, reason: str) -> None:
    path, content = FILES[reason]
    commit_files(folder, "wip", {path: content})
    result = extract()
    assert result.skipped[reason] == 1
    assert path not in paths(everything(result))
    assert "hidden" not in json.dumps(everything(result))


def test_a_file_of_two_gigabytes_is_never_read(
    extract: Extract, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size is in the tree. The tree is faked, because git needs minutes to add such a file."""
    files = RepoReader.files

    def with_a_huge_file(checkout: RepoReader, sha: str) -> Iterator[Any]:
        for file in files(checkout, sha):
            yield file if file.path != "src/apple.py" else type(file)(file.path, "f" * 40, 2_000_000_000)

    monkeypatch.setattr(RepoReader, "files", with_a_huge_file)
    result = extract()
    assert result.skipped["too_large"] == 1
    assert len(read) == len(NAMES) - 1
    assert "f" * 40 not in read


def test_links_and_submodules_are_skipped(extract: Extract, folder: Path) -> None:
    (folder / "link.py").symlink_to("/etc/passwd")
    git(folder, "update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},module.py")
    commit_files(folder, "wip", {})
    assert extract().files == len(NAMES)


def test_licence_headers_are_removed(extract: Extract, folder: Path) -> None:
    header = "/*\n * Copyright (c) 2020 Somebody Important.\n * Permission is hereby granted to everybody.\n */\n"
    add = "/* Adds up two numbers. */\nint add(int a, int b) {\n  int sum = a + b;\n  return sum;\n}\n"
    other = "int other(void) {\n  int a = 1;\n  return a;\n}\n"
    commit_files(folder, "Add a function that adds up", {"src/add.c": header + add, "src/other.c": header + other})
    text = json.dumps(everything(extract(Limits(0.0, 4000, 100_000, 100))))
    assert "Adds up two numbers." in text
    assert "Somebody Important" not in text
    assert "Permission is hereby" not in text


def test_only_changed_files_are_read_again(extract: Extract, folder: Path, read: list[str]) -> None:
    first = extract()
    assert (first.extracted, first.unchanged) == (len(NAMES) + 1, 0)
    read.clear()
    commit_files(folder, "Let the lemon be something else", {"src/lemon.py": module("lemon", "\n\nZEST = 1\n")})
    second = extract()
    assert (second.extracted, second.unchanged) == (2, len(NAMES))  # the file, and the commit
    assert len(read) == 1
    # The result equals a full extraction.
    assert _digests(second) == _digests(extract(cache="another.sqlite"))
    assert _digests(second) != _digests(first)


def _digests(result: ExtractionResult) -> list[str]:
    return [content.digest for content in (result.written.train, result.written.held_out) if content]


def test_removed_files_leave_no_samples(extract: Extract, folder: Path) -> None:
    extract()
    git(folder, "rm", "src/lemon.py")
    commit_files(folder, "wip", {})
    assert "src/lemon.py" not in paths(everything(extract()))


@pytest.mark.parametrize("damage", [b"", b"no database at all" * 1000])
def test_a_broken_cache_is_rebuilt(extract: Extract, tmp_path: Path, damage: bytes) -> None:
    first = extract()
    (tmp_path / "cache.sqlite").write_bytes(damage)
    assert (rebuilt := extract()).extracted == first.extracted
    assert _digests(rebuilt) == _digests(first)


def test_another_extractor_or_limit_invalidates_the_cache(extract: Extract, monkeypatch: pytest.MonkeyPatch) -> None:
    first = extract()
    assert extract(Limits(0.2, 3999, 100_000, 100)).extracted == first.extracted
    monkeypatch.setattr(extraction_cache, "extractor", lambda: "another")
    assert extract().extracted == first.extracted


def test_files_extracted_before_a_stop_are_cached(
    extract: Extract, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract_data_pipeline, "BATCH_FILES", 2)
    parts: list[float] = []

    def stop_in_the_middle(part: float, phase: str) -> None:
        parts.append(part)
        if len(parts) == 4:
            raise StopJob("pause")

    with pytest.raises(StopJob):
        extract(report=stop_in_the_middle)
    result = extract()
    assert result.unchanged == 6
    assert _digests(result) == _digests(extract(cache="another.sqlite"))


def test_several_processes_extract_the_same(extract: Extract, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extract_data_pipeline, "MIN_PARALLEL_FILES", 1)
    monkeypatch.setattr(extract_data_pipeline, "BATCH_FILES", 3)
    assert _digests(extract(processes=2)) == _digests(extract(cache="another.sqlite"))


def test_merge_commits_are_skipped(extract: Extract, folder: Path) -> None:
    git(folder, "checkout", "-b", "side")
    commit_files(folder, "Write down what the fruits are for", {"notes.txt": "fruits\n"})
    git(folder, "checkout", "main")
    commit_files(folder, "Write down what the houses are for", {"houses.txt": "houses\n"})
    git(folder, "merge", "--no-ff", "--message", "Bring both of the notes together", "side")
    result = extract()
    messages = {answer(sample) for sample in everything(result) if sample["source"]["kind"] == "commit"}
    assert {"Write down what the fruits are for", "Write down what the houses are for"} <= messages
    assert "Bring both of the notes together" not in messages
    assert result.skipped["commit_merges"] == 1


@pytest.fixture
async def registered(database: Database, folder: Path) -> None:
    async with database.transaction() as session:
        session.add(repository_of(folder, "garden"))


def repository_of(folder: Path, name: str) -> Repository:
    return Repository(
        id=f"repo_{name}", name=name, path=str(folder), model=name, training={}, policy={}, created_by="test"
    )


@pytest.fixture(autouse=True)
def roots(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_GUARDIAN__ROOTS", f"[{tmp_path}]")
    get_settings.cache_clear()


async def run_job(spec: ExtractSpec, link: RecordingLink, state: Any = None) -> dict[str, Any]:
    claim = Claim("job_x", "t", "extract_data", {}, state, 1, 3, None, None, {}, "w", None)
    return await asyncio.to_thread(extract_data, Context(claim, link), spec)


async def test_the_job_stores_two_datasets(database: Database, registered: None, folder: Path) -> None:
    link = RecordingLink()
    result = await run_job(ExtractSpec(repository_id="garden", held_out=0.2), link)
    head = git(folder, "rev-parse", "HEAD")
    assert (result["repository"], result["commit"], result["files"]) == ("garden", head, len(NAMES))
    assert link.checkpoints == [head]
    assert link.inputs == ["repo/garden/train", "repo/garden/held-out"]
    async with database.read_transaction() as session:
        stored = {dataset.name: dataset for dataset in await session.scalars(select(Dataset))}
    train, held_out = stored["repo/garden/train"], stored["repo/garden/held-out"]
    assert result["train"] == {"dataset": train.id, "name": "repo/garden/train:v1", "samples": train.samples}
    assert result["held_out"]["dataset"] == held_out.id
    assert train.source == {"repository": "garden", "commit": head}
    assert sum(result["by_kind"].values()) == train.samples + held_out.samples
    loaded = await asyncio.to_thread(datasets.load, train)
    assert len(loaded) == train.samples
    # A second extraction of the same commit stores no new datasets.
    repeated = await run_job(ExtractSpec(repository_id="repo_garden", held_out=0.2), RecordingLink())
    assert (repeated["train"], repeated["extracted"]) == (result["train"], 0)


async def test_a_resumed_attempt_keeps_its_commit(registered: None, folder: Path) -> None:
    first_commit = git(folder, "rev-parse", "HEAD")
    commit_files(folder, "Come in the meantime and be new", {"src/new.py": module("new")})
    result = await run_job(ExtractSpec(repository_id="garden"), RecordingLink(), first_commit)
    assert (result["commit"], result["files"]) == (first_commit, len(NAMES))


async def test_the_log_names_the_place_of_a_secret_but_not_its_value(registered: None, folder: Path) -> None:
    commit_files(folder, "wip", {"src/apple.py": module("apple", f'\n\nKEY = "{AWS_KEY}"\n')})
    link = RecordingLink()
    result = await run_job(ExtractSpec(repository_id="garden"), link)
    assert any("src/apple.py:11: a secret (AWS Access Key)" in line for line in link.logged)
    assert result["secrets"]["AWS Access Key"] >= 1
    assert AWS_KEY not in json.dumps(result) + "".join(link.logged)


async def test_a_repository_without_samples_fails_with_the_numbers(database: Database, tmp_path: Path) -> None:
    folder = new_repository(tmp_path / "empty")
    commit_files(folder, "wip", {"data.bin": b"\0\1", "more.bin": b"\0\1"})
    async with database.transaction() as session:
        session.add(
            Repository(id="repo_2", name="empty", path=str(folder), model="m", training={}, policy={}, created_by="t")
        )
    with pytest.raises(NothingToExtract, match="2 files, of which 1 commit_says_little, 2 other_kind are skipped"):
        await run_job(ExtractSpec(repository_id="empty"), RecordingLink())
