"""What is written is on the disk before it has its name, and the name is on the disk when the call returns."""

import errno
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

from cluster import durable, storage
from cluster.secrets import seal
from pipelines.training.models import cache


class Calls(list[tuple[str, str]]):
    """The calls that matter, in order: ("sync", path) and ("name", path)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        fsync, replace, link = os.fsync, os.replace, os.link

        def record_sync(descriptor: int) -> None:
            self.append(("sync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
            fsync(descriptor)

        def record_replace(source: str, target: str) -> None:
            self.append(("name", str(target)))
            replace(source, target)

        def record_link(source: str, target: str) -> None:
            self.append(("name", str(target)))
            link(source, target)

        monkeypatch.setattr(os, "fsync", record_sync)
        monkeypatch.setattr(os, "replace", record_replace)
        monkeypatch.setattr(os, "link", record_link)


def write_to_storage(home: Path) -> Path:
    return Path(storage.write(BytesIO(b"content"), "files/one"))


def create_key(home: Path) -> Path:
    home.mkdir()
    seal("secret")
    return home / "keys" / "sealing"


def cache_a_model(home: Path) -> Path:
    (home / "model.gguf").parent.mkdir()
    (home / "model.gguf").write_bytes(b"GGUF")
    return cache.cache_file(home / "model.gguf", "0" * 64)


def publish_a_folder(home: Path) -> Path:
    (home / "draft" / "deep").mkdir(parents=True)
    (home / "draft" / "deep" / "weights").write_bytes(b"content")
    durable.publish(home / "draft", home / "model")
    return home / "model"


@pytest.mark.parametrize("write", [write_to_storage, create_key, cache_a_model, publish_a_folder])
def test_content_is_synced_before_it_has_its_name_and_the_name_after(
    home: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Path]
) -> None:
    calls = Calls(monkeypatch)
    target = write(home)
    named = max(index for index, call in enumerate(calls) if call == ("name", str(target)))
    drafts = [path for kind, path in calls[:named] if kind == "sync" and Path(path).parent == target.parent]
    assert drafts
    assert ("sync", str(target.parent)) in calls[named:]
    for content in target.rglob("*"):
        assert ("sync", f"{drafts[0]}/{content.relative_to(target)}") in calls[:named]


def test_new_folders_are_synced_into_their_parents(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    storage.write(BytesIO(b"content"), "jobs/job_x/token/model/weights")
    synced = {path for kind, path in calls if kind == "sync"}
    root = home / "storage"
    assert {str(home), *(str(root / part) for part in ("", "jobs", "jobs/job_x", "jobs/job_x/token"))} <= synced


def test_a_file_system_that_cannot_sync_folders_is_used_anyway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    durable.sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        durable.sync(tmp_path / "file")
