"""Which folders are leftovers of failed downloads: those of the service, that its history no longer speaks of."""

from pathlib import Path

import pytest

from cluster.services.capabilities.download_tracking import FinishedFolders
from pipelines.media.downloads import orphans


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    for name in ("_FAILED_Lost", "_FAILED_Known", "_UNPACK_Busy", "Good", "tv/_FAILED_Episode", "other/_FAILED_Else"):
        (tmp_path / "complete" / name).mkdir(parents=True)
    (tmp_path / "complete" / "_FAILED_File").write_text("")
    (tmp_path / "elsewhere" / "_FAILED_Linked").mkdir(parents=True)
    (tmp_path / "complete" / "_FAILED_Link").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "complete"


def names(complete: Path, subfolders: tuple[str, ...] = ("tv",)) -> list[str]:
    known = frozenset({"/data/complete/_FAILED_Known/file.mkv"})
    finished = FinishedFolders("/data/complete", subfolders, known)
    return [one.service_path for one in orphans.find(finished, {"/data": str(complete.parent)})]


def test_only_what_is_marked_and_unknown_is_a_leftover(complete: Path) -> None:
    assert names(complete) == ["/data/complete/_FAILED_Lost", "/data/complete/tv/_FAILED_Episode"]


def test_no_category_leads_out_of_the_folder(complete: Path) -> None:
    (complete / "away").symlink_to(complete.parent / "elsewhere")
    assert names(complete, ("../elsewhere", "away", str(complete.parent / "elsewhere"))) == [
        "/data/complete/_FAILED_Lost"
    ]


def test_only_a_folder_that_was_mapped_may_be_cleared(complete: Path) -> None:
    finished = FinishedFolders(str(complete), (), frozenset())
    assert {one.is_removable for one in orphans.find(finished, {})} == {False}
    assert {one.is_removable for one in orphans.find(finished, {str(complete): str(complete)})} == {True}
    assert orphans.find(FinishedFolders("/nowhere/complete", (), frozenset()), {}) == []
