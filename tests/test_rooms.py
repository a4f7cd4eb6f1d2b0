"""The layout of the code: where a kind of job is, and how large files and folders may grow."""

from pathlib import Path

from jobs.registry import kinds

ROOT = Path(__file__).parents[1]
PACKAGES = ("cluster", "jobs", "pipelines", "serve")
MAX_LINES = 400
MAX_MODULES = 15


def test_a_kind_is_in_the_module_of_its_name() -> None:
    modules = {name: kind.entrypoint.partition(":")[0].split(".") for name, kind in kinds().items()}
    ours = {name: path for name, path in modules.items() if path[0] in PACKAGES}
    assert len(ours) == 20
    assert [name for name, path in ours.items() if path[-1] != name and path[-2:] != [name, "job"]] == []


def test_no_file_is_too_long_and_no_folder_too_full() -> None:
    modules = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py") if "versions" not in file.parts]
    assert len(modules) > 300
    assert [str(file) for file in modules if len(file.read_text().splitlines()) > MAX_LINES] == []
    folders = {file.parent for file in modules}
    full = [folder for folder in folders if len([*folder.glob("[!_]*.py")]) > MAX_MODULES]
    assert full == []
