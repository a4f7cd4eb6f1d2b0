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
