"""Datasets: uploads and versions, resolution by jobs, folders of documents, and permissions."""

import asyncio
import hashlib
import json
import subprocess
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster import identity, storage
from cluster.db import Database
from cluster.errors import Forbidden, ForgearrError, InvalidRequest
from cluster.ownership import LOCAL, Principal
from cluster.settings import get_settings
from jobs import queue
from jobs.states import State
from pipelines.training.data import datasets, documents, prompts, resolution
from pipelines.training.data.datasets import DatasetDamaged, DatasetNotFound
from pipelines.training.data.documents import NoDocument, TooManyDocuments
from pipelines.training.data.prompts import NoMatchingPrompt, PromptRequest
from pipelines.training.data.resolution import FolderForbidden, FolderNotFound
from pipelines.training.data.samples import PreferencePair, Sample
from pipelines.training.spec import DataSource, FineTuneSpec, PromptFilter
from serve.app import create_app

PATH = "/api/v1/datasets"
PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}'


def chat(answer: str = "Yes.") -> str:
    return json.dumps(
        {"messages": [{"role": "user", "content": "Is it on?"}, {"role": "assistant", "content": answer}]}
    )


@pytest.fixture
async def client(database: Database) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(), client=("127.0.0.1", 40000))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=60) as client:
        yield client


@pytest.fixture
async def alice(database: Database) -> Principal:
    return await account(database, "alice", "user")


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> Path:
    """A folder that all users may read."""
    folder = tmp_path / "shared"
    folder.mkdir()
    monkeypatch.setenv("FORGEARR_FORGE__FOLDERS", f"[{folder}]")
    get_settings.cache_clear()
    return folder


async def account(database: Database, name: str, role: identity.Role) -> Principal:
    async with database.transaction() as session:
        user = await identity.add_user(
            session, email=f"{name}@example.com", username=name, password_hash="-", role=role
        )
    return identity.principal(user)


async def upload(client: httpx.AsyncClient, name: str, *lines: str) -> dict[str, Any]:
    response = await client.post(PATH, params={"name": name}, content="\n".join(lines))
    assert response.status_code == 201, response.text
    return response.json()


async def resolve(data: DataSource, principal: Principal = LOCAL) -> datasets.Dataset:
    return await asyncio.to_thread(resolution.resolve, data, principal.id)


async def load(data: DataSource, principal: Principal = LOCAL) -> list[Any]:
    dataset = await resolve(data, principal)
    assert (await asyncio.to_thread(datasets.get, dataset.id)).digest == dataset.digest
    return list(datasets.load(dataset))


# Uploads


@pytest.mark.usefixtures("any_storage")
async def test_a_dataset_has_a_version_for_each_content(client: httpx.AsyncClient) -> None:
    first = await upload(client, "home", chat())
    spaced = chat().replace(": ", ":   ")
    repeated = await upload(client, "home", "", spaced, "")
    assert repeated == first, "the same content, written differently"
    second = await upload(client, "home", chat(), chat("No."))
    other_name = await upload(client, "other", chat())
    assert (first["version"], second["version"], other_name["version"]) == (1, 2, 1)
    assert first["digest"] == other_name["digest"] != second["digest"]
    assert (first["kind"], second["samples"]) == ("chat", 2)

    content = await client.get(f"{PATH}/{second['id']}/content")
    assert content.headers["content-type"] == "application/x-ndjson"
    assert hashlib.sha256(content.content).hexdigest() == second["digest"]
    assert len(content.content) == second["bytes"]
    assert [json.loads(line) for line in content.text.splitlines()] == [json.loads(chat()), json.loads(chat("No."))]
    stored = sorted(Path(address).stem for address in storage.find("datasets"))
    assert stored == sorted([first["digest"], second["digest"]])

    page = (await client.get(PATH)).json()
    assert page["total"] == 3
    assert (await client.get(PATH, params={"name": "other"})).json()["items"] == [other_name]
    for reference, expected in (("home", second), ("home:v1", first), ("home:v2", second), (first["id"], first)):
        assert (await client.get(f"{PATH}/{reference}")).json() == expected
    for reference in ("nothing", "home:v3", "home:v", "home:vx", "home:v9999999999999999999", "ds_1"):
        missing = await client.get(f"{PATH}/{reference}")
        assert (missing.status_code, missing.json()["error_code"]) == (404, "DATASET_NOT_FOUND")


async def test_a_file_is_deleted_with_its_last_dataset(client: httpx.AsyncClient, home: Path) -> None:
    first, second = await upload(client, "one", chat()), await upload(client, "two", chat())
    file = home / "storage" / "datasets" / f"{first['digest']}.jsonl"
    assert (await client.delete(f"{PATH}/{first['id']}")).status_code == 204
    assert file.exists()
    assert (await client.delete(f"{PATH}/{first['id']}")).status_code == 404
    assert (await client.delete(f"{PATH}/two")).status_code == 404, "only an id names what is deleted"
    assert (await client.delete(f"{PATH}/{second['id']}")).status_code == 204
    assert not file.exists()
    third = await upload(client, "one", chat())
    assert (await client.get(f"{PATH}/{third['id']}/content")).status_code == 200


@pytest.mark.parametrize("reference", ["home", "home:v1"])
async def test_a_dataset_in_use_cannot_be_deleted(
    client: httpx.AsyncClient, database: Database, reference: str
) -> None:
    dataset = await upload(client, "home", chat())
    async with database.transaction() as session:
        job = queue.rejected_job(queue.JobRequest(kind="fine_tune", spec={"data": {"dataset": reference}}), LOCAL, {})
        job.state, job.finished_at = State.QUEUED, None
        session.add(job)
    refused = await client.delete(f"{PATH}/{dataset['id']}")
    assert (refused.status_code, refused.json()["error_code"]) == (409, "DATASET_IN_USE")
    assert job.id in refused.json()["message"]
    async with database.transaction() as session:
        await queue.cancel(session, await queue.get(session, job.id, LOCAL))
    assert (await client.delete(f"{PATH}/{dataset['id']}")).status_code == 204


async def test_concurrent_uploads_make_one_dataset_per_content(client: httpx.AsyncClient) -> None:
    uploaded = await asyncio.gather(*(upload(client, "home", chat()) for _ in range(8)))
    assert len({item["id"] for item in uploaded}) == 1
    uploaded = await asyncio.gather(*(upload(client, "home", chat(str(number))) for number in range(8)))
    assert sorted(item["version"] for item in uploaded) == list(range(2, 10))


@pytest.mark.parametrize(
    ("body", "code", "reason"),
    [
        ("", "EMPTY_DATA", "no sample in the upload"),
        ("\n\n", "EMPTY_DATA", "no sample in the upload"),
        (f"{chat()}\nno", "INVALID_SAMPLE", "line 2 of the upload is not JSON"),
        (f"{chat()}\n{PAIR}", "INVALID_SAMPLE", "line 2 of the upload is preferences"),
        ('{"messages": [{"role": "user", "content": "Hello"}]}', "INVALID_SAMPLE", "line 1 of the upload"),
        (b"\x00\x01\x02", "INVALID_SAMPLE", "line 1 of the upload is not JSON"),
    ],
)
async def test_an_invalid_upload_changes_nothing(
    client: httpx.AsyncClient, home: Path, body: str | bytes, code: str, reason: str
) -> None:
    # The content type does not matter.
    for content_type in ("application/x-ndjson", "application/json", "text/plain"):
        response = await client.post(
            PATH, params={"name": "home"}, content=body, headers={"Content-Type": content_type}
        )
        assert (response.status_code, response.json()["error_code"]) == (400, code)
        assert reason in response.json()["message"]
    assert (await client.get(PATH)).json()["total"] == 0
    assert not (home / "storage").exists()


@pytest.mark.parametrize("name", ["", "Home", "a/b", "../x", "demo/homelab", "x" * 101, "ä", "a\n"])
async def test_an_invalid_name_is_refused(client: httpx.AsyncClient, name: str) -> None:
    assert (await client.post(PATH, params={"name": name}, content=chat())).status_code == 422


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_a_long_upload_takes_little_memory(client: httpx.AsyncClient) -> None:
    """40 MB, which is more than other routes accept."""
    line = f"{chat('word ' * 4000)}\n".encode()

    async def body() -> AsyncIterator[bytes]:
        for _ in range(2000):
            yield line

    tracemalloc.start()
    response = await client.post(PATH, params={"name": "long"}, content=body())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert response.status_code == 201
    assert response.json()["bytes"] > 32 * 1024 * 1024
    assert peak < 8e6, f"{peak / 1e6:.0f} MB"


async def test_the_size_of_an_upload_is_limited(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.training.datasets.MAX_UPLOAD_BYTES", 1000)
    refused = await client.post(PATH, params={"name": "home"}, content=f"{chat()}\n" * 100)
    assert (refused.status_code, refused.json()["error_code"]) == (413, "BODY_TOO_LARGE")


# Resolution by jobs


async def test_a_dataset_is_resolved_by_name_and_by_id(
    client: httpx.AsyncClient, database: Database, alice: Principal
) -> None:
    old = await upload(client, "home", chat())
    new = await upload(client, "home", chat("No."))
    pairs = await upload(client, "pairs", PAIR)
    assert (await resolve(DataSource(dataset="home"))).id == new["id"]
    assert (await resolve(DataSource(dataset="home:v1"))).id == old["id"]
    assert (await resolve(DataSource(dataset=old["id"]))).id == old["id"]
    (sample,) = await load(DataSource(dataset="home"))
    assert isinstance(sample, Sample)
    (pair,) = await load(DataSource(dataset="pairs"))
    assert isinstance(pair, PreferencePair)
    for reference in ("home", old["id"], pairs["id"]):
        with pytest.raises(DatasetNotFound, match=f"There is no dataset '{reference}'"):
            await resolve(DataSource(dataset=reference), alice)


async def test_everybody_gets_the_shipped_dataset(database: Database, alice: Principal) -> None:
    alices_dataset, local_dataset = (
        await resolve(DataSource(dataset="demo/homelab"), alice),
        await resolve(DataSource(dataset="demo/homelab")),
    )
    assert alices_dataset.id != local_dataset.id
    assert alices_dataset.digest == local_dataset.digest
    assert (await resolve(DataSource(dataset="demo/homelab"), alice)).id == alices_dataset.id
    assert datasets.load(alices_dataset) == resolution.demo_samples()
    assert (alices_dataset.created_by, local_dataset.created_by) == ("alice", "local")


async def test_prompts_become_a_dataset_that_later_changes_do_not_affect(database: Database, alice: Principal) -> None:
    async with database.transaction() as session:
        for name in ("One", "Two"):
            request = PromptRequest(name=name, user_input=name, expected_output="Yes.", tags=["Home Media"])
            await prompts.create(session, request, alice)
    data = DataSource(prompts=PromptFilter(tags=["Home Media"]))
    first = await resolve(data, alice)
    assert (first.name, first.version, first.samples) == ("prompts/home-media", 1, 2)
    assert first.source == {"prompts": {"tags": ["Home Media"]}}
    assert (await resolve(data, alice)).id == first.id
    async with database.transaction() as session:
        one, two = await prompts.find_matching_ids(session, PromptFilter(tags=["Home Media"]), alice)
        await session.delete(await prompts.get(session, one, alice))
        await prompts.update_prompt(session, await prompts.get(session, two, alice), {"expected_output": "No."})
    assert [sample.messages[0].content for sample in datasets.load(first)] == ["One", "Two"]
    second = await resolve(data, alice)
    assert (second.name, second.version, second.samples) == ("prompts/home-media", 2, 1)
    with pytest.raises(NoMatchingPrompt):
        await resolve(DataSource(prompts=PromptFilter(category="nothing")), alice)


async def test_a_damaged_file_is_detected(client: httpx.AsyncClient, home: Path) -> None:
    uploaded = await upload(client, "home", chat())
    dataset = await resolve(DataSource(dataset="home"))
    file = home / "storage" / "datasets" / f"{uploaded['digest']}.jsonl"
    file.write_text(chat("No.") + "\n")
    with pytest.raises(DatasetDamaged, match="has changed"):
        datasets.load(dataset)
    file.unlink()
    with pytest.raises(DatasetDamaged, match="is missing"):
        datasets.load(dataset)
    response = await client.get(f"{PATH}/{uploaded['id']}/content")
    assert (response.status_code, response.json()["error_code"]) == (500, "DATASET_DAMAGED")
    assert await upload(client, "home", chat()) == uploaded
    assert len(datasets.load(dataset)) == 1, "uploading it again repairs it"


async def test_an_unknown_owner_cannot_resolve_a_dataset(database: Database) -> None:
    with pytest.raises(Forbidden, match="does not exist"):
        await asyncio.to_thread(resolution.resolve, DataSource(dataset="demo/homelab"), "x" * 36)


# Folders


def test_a_folder_yields_the_text_of_its_files(tmp_path: Path) -> None:
    readme = """---
title: x
---
Intro.

# Home

## Disks ##
Two disks.
```sh
# no heading
```
# Net

A switch.
"""
    files = {
        "README.md": readme,
        "notes/plan.txt": "First.\r\n\r\nSecond.\n",
        "samples.jsonl": chat() + "\n",
        ".hidden.md": "hidden",
        ".git/config.txt": "hidden",
        "node_modules/x/README.md": "foreign",
        "program.py": "print()",
        "picture.txt": b"\x89PNG\x00\xff",
        "nul.md": b"a\0b",
        "empty.md": "",
    }
    write(tmp_path, files)
    (tmp_path / "link.md").symlink_to("/etc/hostname")
    (tmp_path / "way-out").symlink_to("/etc")
    reading = documents.read_folder(tmp_path)
    texts = [tuple(message.content for message in sample.messages) for sample in reading.samples]
    assert texts == [
        ("What does README.md say?", "Intro."),
        ("What does README.md say about Home / Disks?", "Two disks.\n```sh\n# no heading\n```"),
        ("What does README.md say about Net?", "A switch."),
        ("Is it on?", "Yes."),
        ("What does notes/plan.txt say?", "First.\n\nSecond."),
    ]
    assert reading.skipped == ["nul.md", "picture.txt"]
    assert reading.files == 4
    assert documents.read_folder(tmp_path) == reading


def test_a_long_text_is_split_into_parts(tmp_path: Path) -> None:
    paragraphs = [f"{number} " + "word " * 150 for number in range(6)]
    write(tmp_path, {"long.txt": "\n\n".join(paragraphs), "wide.txt": "x" * 5000})
    samples = documents.read_folder(tmp_path).samples
    questions = [sample.messages[0].content for sample in samples]
    answers = [sample.messages[1].content or "" for sample in samples]
    assert questions == [
        *(f"What does long.txt say? (part {part} of 3)" for part in (1, 2, 3)),
        *(f"What does wide.txt say? (part {part} of 3)" for part in (1, 2, 3)),
    ]
    assert max(len(answer) for answer in answers) <= documents.CHUNK_CHARACTERS
    assert "".join(answers[3:]) == "x" * 5000
    assert [word for answer in answers[:3] for word in answer.split()] == " ".join(paragraphs).split()


async def test_each_state_of_a_repository_is_a_version(database: Database, tmp_path: Path) -> None:
    repository = tmp_path / "Media Stack"
    write(repository, {"README.md": "# Media\nIt plays."})
    await asyncio.to_thread(subprocess.run, ["git", "init", "-q", repository], check=True)
    data = DataSource(folder=str(repository))
    first = await resolve(data)
    assert (first.name, first.version, first.source) == (
        "folder/media-stack",
        1,
        {"folder": str(repository), "files": 1, "skipped": 0},
    )
    assert (await resolve(data)).id == first.id
    write(repository, {"README.md": "# Media\nIt plays everything."})
    second = await resolve(data)
    assert (second.name, second.version) == ("folder/media-stack", 2)


@pytest.mark.parametrize(
    ("files", "error", "reason"),
    [
        ({}, NoDocument, "has no document with text"),
        ({"a.py": "x", "b.md": "\n\n"}, NoDocument, "has no document with text"),
        ({"deep/bad.jsonl": f"{chat()}\n{{"}, InvalidRequest, "line 2 of deep/bad.jsonl is not JSON"),
        ({"a.md": "text", "b.jsonl": PAIR}, InvalidRequest, "both preference pairs and other documents"),
    ],
)
async def test_a_folder_without_usable_documents_is_refused(
    database: Database, tmp_path: Path, files: dict[str, str], error: type[ForgearrError], reason: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, files)
    with pytest.raises(error, match=reason):
        await resolve(DataSource(folder=str(folder)))


def test_the_size_of_a_folder_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {f"{number}.md": "text" for number in range(5)})
    assert len(documents.read_folder(tmp_path).samples) == 5
    for name, value in (("MAX_BYTES", 19), ("MAX_FILES", 4)):
        monkeypatch.setattr(documents, name, value)
        with pytest.raises(TooManyDocuments, match="name a subfolder"):
            documents.read_folder(tmp_path)
        monkeypatch.undo()


async def test_folders_are_for_administrators_unless_they_are_shared(
    database: Database, shared: Path, tmp_path: Path, alice: Principal
) -> None:
    private = tmp_path / "private"
    for folder in (shared, private):
        write(folder, {"README.md": "text"})
    (shared / "way-out").symlink_to(private)
    (private / "way-in").symlink_to(shared)
    closed = [private, shared / "way-out", shared / ".." / "private", tmp_path, shared.with_name("shared2"), Path("/")]
    open_ = [shared, private / "way-in", shared / "." / "way-out" / ".." / "shared"]
    for path in closed:
        assert resolution.admin_choice(DataSource(folder=str(path)))
        assert resolution.admin_choice(FineTuneSpec(base_model=str(path), data=DataSource(dataset="x")))
        with pytest.raises(FolderForbidden):
            await resolve(DataSource(folder=str(path)), alice)
        with pytest.raises(FolderForbidden):
            await require_usable(database, DataSource(folder=str(path)), alice)
    for path in open_:
        assert not resolution.admin_choice(FineTuneSpec(base_model=str(path), data=DataSource(folder=str(path))))
        assert await load(DataSource(folder=str(path)), alice)
        await require_usable(database, DataSource(folder=str(path)), alice)
    admin = await account(database, "admin", "admin")
    for owner in (LOCAL, admin):
        assert await load(DataSource(folder=str(private)), owner)
    for base in ("forgearr/tiny", "homelab:v3", "owner/name"):
        assert not resolution.admin_choice(FineTuneSpec(base_model=base, data=DataSource(dataset="x")))
    for base in ("~/model", "../model", "./model"):
        assert resolution.admin_choice(FineTuneSpec(base_model=base, data=DataSource(dataset="x")))


@pytest.mark.parametrize("path", ["/no/such/folder", "/etc/hostname", "/" + "x" * 300, "~nobody-of-this-name/x"])
async def test_a_path_that_is_no_folder_is_refused(database: Database, path: str) -> None:
    with pytest.raises(FolderNotFound):
        await require_usable(database, DataSource(folder=path), LOCAL)
    with pytest.raises(FolderNotFound):
        await resolve(DataSource(folder=path))


async def test_unusable_data_is_refused_before_a_job_is_queued(
    client: httpx.AsyncClient, database: Database, alice: Principal
) -> None:
    await upload(client, "home", chat())
    await require_usable(database, DataSource(dataset="home"), LOCAL)
    await require_usable(database, DataSource(dataset="demo/homelab"), alice)
    for data, owner, status in (
        (DataSource(dataset="home"), alice, 404),
        (DataSource(dataset="nothing"), LOCAL, 404),
        (DataSource(prompts=PromptFilter(tags=["nothing"])), LOCAL, 400),
        (DataSource(prompts=PromptFilter(ids=[7])), LOCAL, 404),
        (DataSource(folder="/nowhere"), LOCAL, 400),
        (DataSource(folder="/nowhere"), alice, 403),
    ):
        with pytest.raises(ForgearrError) as refused:
            await require_usable(database, data, owner)
        assert refused.value.status == status


async def require_usable(database: Database, data: DataSource, principal: Principal) -> None:
    async with database.read_transaction() as session:
        await resolution.require_usable(session, data, principal, "supervised")


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
