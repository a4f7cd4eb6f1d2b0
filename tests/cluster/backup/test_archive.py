"""The file of a backup: whatever is changed in it, it is refused as a whole."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from cluster.backup import archive, content
from cluster.backup.archive import ArchiveWriter, open_archive
from cluster.backup.encryption import Key
from cluster.backup.errors import BackupDamaged, BackupFailed, BackupNewer, NoBackup, WrongPassphrase
from cluster.backup.manifest import FileEntry, Header, Manifest
from cluster.db import now

PASSPHRASE = "correct horse battery"
FILES = {"database": b"rows" * 700, "storage/files/one": bytes(range(256)) * 20, "storage/empty": b""}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for name, text in FILES.items():
        paths[name] = tmp_path / "files" / name
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        paths[name].write_bytes(text)
    return paths


def header(**values: object) -> Header:
    known = Header(
        version="1.2.3",
        revision="0001",
        engine="SQLite",
        created_at=now(),
        is_encrypted=False,
        has_secrets=False,
        mlflow="none",
        content_bytes=1,
    )
    return known.model_copy(update=values)


def write(path: Path, files: dict[str, Path], **values: object) -> Path:
    with path.open("w+b") as file:
        writer = ArchiveWriter(file)
        writer.add(archive.HEADER, header(**values).model_dump_json().encode())
        with writer.member(archive.PLAIN) as target:
            content.write(target, files, "/home", "/storage", lambda done: None)
        writer.finish()
    return path


def read(path: Path, folder: Path) -> Manifest:
    with open_archive(path) as opened:
        return content.extract(opened.open(archive.PLAIN), folder)


def test_what_is_written_is_read(files: dict[str, Path], tmp_path: Path) -> None:
    manifest = read(write(tmp_path / "backup.tar", files), tmp_path / "out")
    assert set(manifest.files) == set(FILES)
    assert {name: (tmp_path / "out" / name).read_bytes() for name in FILES} == FILES
    assert (tmp_path / "out" / "database").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "out" / "storage").stat().st_mode & 0o777 == 0o700


def test_tar_reads_it(files: dict[str, Path], tmp_path: Path) -> None:
    path = write(tmp_path / "backup.tar", files)
    subprocess.run(["tar", "xf", path, "-C", tmp_path], check=True)
    assert json.loads((tmp_path / archive.HEADER).read_text())["version"] == "1.2.3"
    with tarfile.open(tmp_path / archive.PLAIN) as tar:
        assert [*FILES, content.MANIFEST] == tar.getnames()


def test_each_changed_byte_is_noticed(files: dict[str, Path], tmp_path: Path) -> None:
    whole = write(tmp_path / "backup.tar", files).read_bytes()
    changed = tmp_path / "changed.tar"
    for position in range(0, len(whole), 61):
        changed.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises((BackupDamaged, NoBackup, BackupNewer)):
            read(changed, tmp_path / f"out-{position}")
        assert not (tmp_path / f"out-{position}").exists()


def test_a_file_that_was_cut_off_or_grew_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    whole = write(tmp_path / "backup.tar", files).read_bytes()
    changed = tmp_path / "changed.tar"
    for size in (0, 1, 511, 512, 700, 2000, len(whole) - 512, len(whole) - 1):
        changed.write_bytes(whole[:size])
        with pytest.raises((BackupDamaged, NoBackup)):
            read(changed, tmp_path / "out")
    changed.write_bytes(whole + bytes(512))
    with pytest.raises(BackupDamaged):
        read(changed, tmp_path / "out")


def test_another_file_is_no_backup(tmp_path: Path) -> None:
    with pytest.raises(NoBackup, match="There is no file"):
        read(tmp_path / "missing.tar", tmp_path / "out")
    (tmp_path / "text").write_text("something else " * 1000)
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(tmp_path / "text", "text")
    for name in ("text", "other.tar"):
        with pytest.raises(NoBackup, match="is not a backup of Forgearr"):
            read(tmp_path / name, tmp_path / "out")


def test_a_newer_format_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    path = write(tmp_path / "backup.tar", files, format=2, version="9.0.0")
    with pytest.raises(BackupNewer, match=r"made by Forgearr 9\.0\.0"):
        read(path, tmp_path / "out")


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_no_file_is_written_elsewhere(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    path = write(tmp_path / "backup.tar", {name: files["database"]})
    with pytest.raises(BackupDamaged, match="no file of an installation"):
        read(path, tmp_path / "deep" / "out")
    assert not [*tmp_path.rglob("outside")]


def test_a_file_that_is_not_what_its_manifest_says_is_refused(tmp_path: Path) -> None:
    def tar(listed: dict[str, FileEntry]) -> io.BytesIO:
        target = io.BytesIO()
        manifest = Manifest(home="/h", storage="/s", files=listed).model_dump_json().encode()
        with tarfile.open(fileobj=target, mode="w") as writer:
            for name, text in {"one": b"one", content.MANIFEST: manifest}.items():
                info = tarfile.TarInfo(name)
                info.size = len(text)
                writer.addfile(info, io.BytesIO(text))
        target.seek(0)
        return target

    for number, listed in enumerate(
        ({"one": FileEntry(bytes=3, sha256="0")}, {}, {"two": FileEntry(bytes=0, sha256="")})
    ):
        with pytest.raises(BackupDamaged, match="not what it was"):
            content.extract(tar(listed), tmp_path / str(number))


def test_a_file_that_shrinks_while_it_is_read_is_no_backup(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(300_000))

    def truncate(done: int) -> None:
        with path.open("r+b") as file:
            file.truncate(100_000)

    with pytest.raises(BackupFailed, match="became shorter"):
        content.write(io.BytesIO(), {"file": path}, "/home", "/storage", truncate)


def test_a_stream_is_encrypted_with_a_passphrase() -> None:
    text = bytes(range(256)) * 4000
    key, encrypted = Key.new(), io.BytesIO()
    with key.encrypting(encrypted) as target:
        target.write(text)
    assert text[:1000] not in encrypted.getvalue()
    locked = key.lock(PASSPHRASE)
    with Key.open(locked, PASSPHRASE).decrypting(io.BytesIO(encrypted.getvalue())) as source:
        assert source.read() == text
    with pytest.raises(WrongPassphrase):
        Key.open(locked, "another passphrase")


def test_a_damaged_encrypted_stream_is_refused_to_its_last_byte() -> None:
    key, encrypted = Key.new(), io.BytesIO()
    with key.encrypting(encrypted) as target:
        target.write(bytes(200_000))
    whole = encrypted.getvalue()
    for changed in (whole[:-1], whole[:100_000], whole[:-1] + bytes([whole[-1] ^ 1]), whole[:50]):
        with pytest.raises(BackupDamaged), key.decrypting(io.BytesIO(changed)) as source:
            source.read()


def test_the_error_of_who_reads_or_writes_is_raised() -> None:
    key, encrypted = Key.new(), io.BytesIO()
    with key.encrypting(encrypted) as target:
        target.write(bytes(1_000_000))
    with pytest.raises(ZeroDivisionError), key.encrypting(io.BytesIO()):
        raise ZeroDivisionError
    encrypted.seek(0)
    with pytest.raises(ZeroDivisionError), key.decrypting(encrypted):
        raise ZeroDivisionError


def test_a_full_disk_is_named() -> None:
    with (
        Path("/dev/full").open("wb", buffering=0) as full,
        pytest.raises(BackupFailed, match="No space left"),
        Key.new().encrypting(full) as target,
    ):
        target.write(bytes(5_000_000))
