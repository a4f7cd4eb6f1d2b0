"""Storage in a folder and in a bucket in memory."""

from io import BytesIO
from pathlib import Path

import fsspec
import pytest

from cluster import storage
from cluster.settings import get_settings

CONTENT = bytes(range(256)) * 10_000
NAME = "files/one"


class BrokenSource(BytesIO):
    """A source whose second read fails."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell():
            raise OSError("the line is cut")
        return super().read(size)


@pytest.fixture(params=["folder", "bucket"])
def root(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    url = f"memory://{home}" if request.param == "bucket" else str(home / "shared")
    monkeypatch.setenv("FORGEARR_STORAGE__URL", url)
    get_settings.cache_clear()
    storage._filesystem_and_root.cache_clear()  # pyright: ignore[reportPrivateUsage]
    return url


def test_a_stream_is_written_and_read(root: str) -> None:
    address = storage.write(BytesIO(CONTENT), NAME)
    assert address == storage.address(NAME)
    assert (storage.read(address), storage.size(address)) == (CONTENT, len(CONTENT))
    with storage.open_file(address) as file:
        assert file.read(3) == CONTENT[:3]
    storage.write(BytesIO(b"another"), NAME)
    assert storage.read(address) == b"another"
    storage.remove(address)
    assert not storage.exists(address)


@pytest.mark.parametrize("root", ["folder"], indirect=True)  # the bucket in memory has no commit
def test_a_broken_stream_leaves_no_file(root: str) -> None:
    with pytest.raises(OSError, match="the line is cut"):
        storage.write(BrokenSource(CONTENT), NAME)
    assert list_files(root) == []
    address = storage.write(BytesIO(b"whole"), NAME)
    with pytest.raises(OSError, match="the line is cut"):
        storage.write(BrokenSource(CONTENT), NAME)
    assert storage.read(address) == b"whole"
    assert len(list_files(root)) == 1


def test_files_and_folders_are_saved(root: str, tmp_path: Path) -> None:
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "deep" / "weights").write_bytes(CONTENT)
    address = storage.save(tmp_path / "model", "jobs/job_x/model")
    assert storage.read(f"{address}/deep/weights") == CONTENT
    fetched = storage.fetch(address, tmp_path / "copy")
    assert (fetched / "deep" / "weights").read_bytes() == CONTENT


def list_files(root: str) -> list[str]:
    filesystem, path = fsspec.core.url_to_fs(root)
    return filesystem.find(path)
