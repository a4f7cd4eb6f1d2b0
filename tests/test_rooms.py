"""The layout of code and tests: where a kind of job and a test are, and how large files and folders may grow."""

import ast
import re
from importlib import import_module
from pathlib import Path

from jobs.registry import kinds

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
PACKAGES = ("cluster", "jobs", "pipelines", "serve")
DEEP = "pytestmark = [pytest.mark.platform, pytest.mark.deep]"
IMPORT_PATH = re.compile(rf"({'|'.join(PACKAGES)})(\.\w+)*:\w+\Z")
MAX_LINES = 400
MAX_MODULES = 15


def test_a_kind_is_in_the_module_of_its_name() -> None:
    modules = {name: kind.entrypoint.partition(":")[0].split(".") for name, kind in kinds().items()}
    ours = {name: path for name, path in modules.items() if path[0] in PACKAGES}
    assert len(ours) == 21
    assert [name for name, path in ours.items() if path[-1] != name and path[-2:] != [name, "job"]] == []


def test_what_code_names_by_import_path_exists() -> None:
    paths = {
        constant.value
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        for constant in ast.walk(ast.parse(file.read_text()))
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str) and IMPORT_PATH.match(constant.value)
    }
    assert "serve.deployment:build_application" in paths
    for path in paths:
        module, _, name = path.partition(":")
        assert hasattr(import_module(module), name), path


def test_a_test_is_in_the_room_of_its_code() -> None:
    folders = {file.parent.relative_to(TESTS) for package in PACKAGES for file in (TESTS / package).rglob("*.py")}
    assert len(folders) > 40
    assert [str(folder) for folder in folders if not (ROOT / folder).is_dir()] == []


def test_the_folder_deep_has_deep_tests_only() -> None:
    unmarked = [file.name for file in (TESTS / "deep").rglob("test_*.py") if DEEP not in file.read_text()]
    assert unmarked == []


def test_no_file_is_too_long_and_no_folder_too_full() -> None:
    modules = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py") if "versions" not in file.parts]
    assert len(modules) > 300
    assert [str(file) for file in modules if len(file.read_text().splitlines()) > MAX_LINES] == []
    tests = [file for file in TESTS.rglob("*.py") if "bench" not in file.parts]
    folders = {file.parent for file in [*modules, *tests]}
    full = [folder for folder in folders if len([*folder.glob("[!_]*.py")]) > MAX_MODULES]
    assert full == []
