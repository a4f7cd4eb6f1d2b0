"""Which folders are leftovers of failed downloads: those of the service that are not in its history."""

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


def leftovers(complete: Path, subfolders: tuple[str, ...] = ("tv",)) -> list[str]:
    known = frozenset({"/data/complete/_FAILED_Known/file.mkv"})
    finished = FinishedFolders("/data/complete", subfolders, known)
    return [leftover.service_path for leftover in orphans.find(finished, {"/data": str(complete.parent)})]


def test_only_a_failed_folder_that_is_not_in_the_history_is_a_leftover(complete: Path) -> None:
    assert leftovers(complete) == ["/data/complete/_FAILED_Lost", "/data/complete/tv/_FAILED_Episode"]


def test_categories_outside_the_folder_are_ignored(complete: Path) -> None:
    (complete / "away").symlink_to(complete.parent / "elsewhere")
    assert leftovers(complete, ("../elsewhere", "away", str(complete.parent / "elsewhere"))) == [
        "/data/complete/_FAILED_Lost"
    ]


def test_only_leftovers_in_a_mapped_folder_are_removable(complete: Path) -> None:
    finished = FinishedFolders(str(complete), (), frozenset())
    assert {leftover.is_removable for leftover in orphans.find(finished, {})} == {False}
    assert {leftover.is_removable for leftover in orphans.find(finished, {str(complete): str(complete)})} == {True}
    assert orphans.find(FinishedFolders("/nowhere/complete", (), frozenset()), {}) == []


@pytest.mark.parametrize("folder", ["/data/../elsewhere", "/data/complete/../../elsewhere", "/data/complete/away"])
def test_a_folder_that_leads_out_of_the_mapped_one_is_never_removable(complete: Path, folder: str) -> None:
    """The service says where its folder is, and it may say anything."""
    (complete / "away").symlink_to(complete.parent / "elsewhere")
    mapped = {"/data": str(complete.parent / "data")}
    complete.rename(complete.parent / "moved")
    (complete.parent / "data").mkdir()
    (complete.parent / "moved").rename(complete.parent / "data" / "complete")
    found = orphans.find(FinishedFolders(folder, (), frozenset()), mapped)
    assert [leftover for leftover in found if leftover.is_removable] == []
    inside = orphans.find(FinishedFolders("/data/complete/../complete", (), frozenset()), mapped)
    assert {leftover.is_removable for leftover in inside} == {True}


def test_a_known_folder_is_found_however_its_path_is_written(complete: Path) -> None:
    known = frozenset({"/data/complete/../complete/_FAILED_Known", "/data/complete/./_FAILED_Lost/file.mkv"})
    finished = FinishedFolders("/data/tv/../complete", (), known)
    assert orphans.find(finished, {"/data": str(complete.parent)}) == []
