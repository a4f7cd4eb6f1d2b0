"""Storage in a folder, and in a bucket of an S3 server."""

import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster import storage
from cluster.cli import app
from cluster.errors import SettingsError
from cluster.runtime import bootstrap
from cluster.settings import get_settings, load_settings
from cluster.storage import StorageUnavailable
from tests.support.api_client import ApiClient
from tests.support.platform import unused_ports
from tests.support.storage.forget import forget_storage

CONTENT = bytes(range(256)) * 10_000
PARTS = 54
"""A file of this many MB is sent to a bucket in several parts."""
NAME = "files/one"


class BrokenSource(BytesIO):
    """A source whose second read fails."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell():
            raise OSError("the line is cut")
        return super().read(size)


@pytest.mark.usefixtures("any_storage")
def test_a_stream_is_written_and_read() -> None:
    address = storage.write(BytesIO(CONTENT), NAME)
    assert address == storage.address(NAME)
    assert (storage.read(address), storage.size(address)) == (CONTENT, len(CONTENT))
    with storage.open_file(address) as file:
        assert file.read(3) == CONTENT[:3]
    storage.write(BytesIO(b"another"), NAME)
    assert storage.read(address) == b"another"
    storage.write(BytesIO(b""), NAME)
    assert (storage.read(address), storage.size(address)) == (b"", 0)
    storage.remove(address)
    assert not storage.exists(address)
    storage.remove(address)


@pytest.mark.usefixtures("any_storage")
def test_a_file_is_seen_when_it_is_committed() -> None:
    file = storage.StorageWriter(NAME)
    for _ in range(PARTS):
        file.write(bytes(1_000_000))
    assert not storage.exists(storage.address(NAME))
    address = file.commit()
    assert storage.size(address) == PARTS * 1_000_000
    assert unfinished() == []
    file = storage.StorageWriter(NAME)
    file.write(b"another")
    file.discard()
    assert storage.size(address) == PARTS * 1_000_000
    assert unfinished() == []


@pytest.mark.usefixtures("any_storage")
def test_a_broken_stream_leaves_no_file() -> None:
    with pytest.raises(OSError, match="the line is cut"):
        storage.write(BrokenSource(CONTENT), NAME)
    assert storage.find("files") == unfinished() == []
    address = storage.write(BytesIO(b"whole"), NAME)
    with pytest.raises(OSError, match="the line is cut"):
        storage.write(BrokenSource(CONTENT), NAME)
    assert storage.read(address) == b"whole"
    assert (storage.find("files"), unfinished()) == ([address], [])


@pytest.mark.usefixtures("any_storage")
def test_files_and_folders_are_saved(tmp_path: Path) -> None:
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "deep" / "weights").write_bytes(CONTENT)
    (tmp_path / "model" / "empty").touch()
    address = storage.save(tmp_path / "model", "jobs/job_x/model")
    assert storage.read(f"{address}/deep/weights") == CONTENT
    for _ in range(2):  # into the same folder, as a training does that goes back to its checkpoint
        fetched = storage.fetch(address, tmp_path / "copy")
        assert (fetched / "deep" / "weights").read_bytes() == CONTENT
        assert sorted(path.name for path in fetched.rglob("*")) == ["deep", "empty", "weights"]
    assert storage.fetch(f"{address}/deep/weights", tmp_path / "copy").read_bytes() == CONTENT

    (tmp_path / "model" / "deep" / "weights").unlink()
    storage.save(tmp_path / "model", "jobs/job_x/model")
    assert storage.find("jobs/job_x") == [f"{address}/empty"]


@pytest.mark.usefixtures("any_storage")
def test_what_only_begins_like_a_name_is_another_file() -> None:
    names = ["jobs/job_1/model/weights", "jobs/job_1/model2/weights", "jobs/job_10/model/weights"]
    addresses = [storage.write(BytesIO(b"content"), name) for name in names]
    assert storage.find("jobs/job_1") == addresses[:2]
    assert storage.exists(storage.address("jobs/job_1/model"))
    assert not storage.exists(storage.address("jobs/job_1/mod"))
    storage.remove(storage.address("jobs/job_1/model"))
    assert storage.find("jobs") == addresses[1:]
    storage.remove(storage.address("jobs/job_1"))
    assert storage.find("jobs") == addresses[2:]
    assert storage.find("jobs/job_1") == []


def fetch_here(address: str) -> Path:
    return storage.fetch(address, Path())


@pytest.mark.usefixtures("any_storage")
@pytest.mark.parametrize("use", [storage.read, storage.open_file, storage.size, fetch_here])
def test_a_missing_file_is_file_not_found(use: Callable[[str], Any]) -> None:
    with pytest.raises(FileNotFoundError):
        use(storage.address("files/missing"))


def test_what_another_process_stores_and_deletes_is_seen_at_once(any_storage: str) -> None:
    def elsewhere(code: str) -> None:
        program = f"from io import BytesIO; from cluster import storage; {code}"
        subprocess.run([sys.executable, "-c", program], check=True)

    address = storage.write(BytesIO(b"content"), "files/one")
    assert storage.find("files") == [address]
    elsewhere("storage.write(BytesIO(b'content'), 'files/two')")
    assert storage.find("files") == [address, storage.address("files/two")]
    assert storage.exists(storage.address("files/two"))
    elsewhere("storage.remove(storage.address('files'))")
    assert storage.find("files") == []
    assert not storage.exists(address)


# What is wrong is told before the first upload


def test_a_bucket_that_is_there_is_fine(any_storage: str) -> None:
    storage.check()
    assert f"storage    {any_storage}" in CliRunner().invoke(app, ["doctor"]).output


def test_a_bucket_that_does_not_exist_is_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, FORGEARR_STORAGE__URL="s3://no-such-bucket")
    assert_refused(StorageUnavailable, "'no-such-bucket' of storage.url cannot be read: The specified bucket does not")


def test_a_bucket_that_cannot_be_reached_is_told(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, AWS_ENDPOINT_URL=f"http://127.0.0.1:{unused_ports(1)[0]}")
    assert_refused(StorageUnavailable, "storage.url cannot be reached: Could not connect")


def test_missing_credentials_are_told(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    choose(monkeypatch, HOME=str(tmp_path), AWS_EC2_METADATA_DISABLED="true")
    assert_refused(StorageUnavailable, "storage.url cannot be reached: Unable to locate credentials")


def test_missing_s3fs_is_told_with_the_extra(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    choose(monkeypatch)
    assert_refused(SettingsError, f"storage.url is {bucket}, and s3fs is not installed here.*pip install '.\\[s3\\]'")


@pytest.mark.parametrize("url", ["s3://", "s3://Upper", "s3://key:hunter22@bucket", "s3://bucket/a?key=hunter22"])
def test_a_bucket_without_credentials_in_its_address(home: Path, url: str) -> None:
    with pytest.raises(SettingsError, match=r"'storage\.url'") as refused:
        load_settings([f"storage.url={url}"])
    assert "must be s3://bucket/prefix, without credentials" in refused.value.message


@pytest.mark.parametrize("url", ["gs://bucket", "nothing://bucket"])
def test_other_kinds_of_storage_are_refused(home: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    choose(monkeypatch, FORGEARR_STORAGE__URL=url)
    assert_refused(SettingsError, "storage.url must be a folder, or s3://bucket/prefix")


async def test_a_bucket_that_goes_away_is_503(api: ApiClient, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, AWS_ENDPOINT_URL=f"http://127.0.0.1:{unused_ports(1)[0]}")
    response = await api.http.post(
        "/v1/files",
        headers={"Authorization": api.authorization("ada")},
        files={"file": ("a.bin", b"content")},
        data={"purpose": "user_data"},
    )
    assert (response.status_code, response.json()["error"]["code"]) == (503, "STORAGE_UNAVAILABLE".lower())


def choose(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    forget_storage()


def assert_refused(error: type[Exception], message: str) -> None:
    """By `forgearr up` before anything is changed, and by `forgearr doctor`."""
    with pytest.raises(error, match=message):
        bootstrap.bring_up(get_settings(), lambda step, detail: None)
    assert not (Path(str(get_settings().database_url).rpartition("sqlite+aiosqlite:///")[2])).exists()
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "fail storage" in result.output


def unfinished() -> list[Any]:
    """What has been sent of files that are not complete."""
    filesystem, root = storage._filesystem_and_root()  # pyright: ignore[reportPrivateUsage]
    if isinstance(filesystem, storage.Disk):
        return list(Path(root).rglob("*.part"))
    return filesystem.call_s3("list_multipart_uploads", Bucket=root.partition("/")[0]).get("Uploads", [])
