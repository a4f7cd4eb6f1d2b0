"""The documents say what is so: whatever they name exists, and whatever exists is named.

`python -m tests.test_docs` (make docs) writes docs/settings.md and the table of kinds in docs/jobs.md anew; all else is
written by hand.
"""

import ast
import math
import re
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import yaml
from fastapi.routing import APIWebSocketRoute

from cluster.audit_log import Action
from cluster.cli import app as command_line
from cluster.settings import ENVIRONMENT_PREFIX, RESERVED_VARIABLES, Settings
from jobs.registry import kinds
from tests.support.platform import running_platform

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
BLOCK = r"^```\w*\n(.*?)^```"
KINDS_TABLE = r"^(\| Kind \| Module .*\n\|[-|]+\n)(?:\|.*\n)+"
CODE_FOLDERS = "cluster|jobs|pipelines|serve|configs|tests|docs"

SETTINGS_PAGE = """\
# Settings

Made from `cluster/settings/loader.py` and `configs/forgearr.yaml` by `make docs`; do not edit it by hand.

A setting has a value in `configs/forgearr.yaml`, which ships with Forgearr and holds every default. Three places
override it, each the ones before it:

1. `$FORGEARR_HOME/forgearr.yaml`, of the same form: sections with settings under them. Only what differs goes there.
2. The environment. The last column names each variable; its value is read as YAML, so `true`, `8010`, `null` and
   `[a, b]` mean what they look like.
3. The command line of `forgearr up`: `--set serve.port=8010`, as often as needed. What it sets holds for everything
   that this `up` starts.

An unknown setting, or a value that cannot be, stops the start with one sentence that names the setting, the value and
where it came from. `forgearr config show` prints what is in force and its origin, with secrets masked. Settings are
read once, when a process starts: a change takes effect with the next `forgearr up`.

Three more variables are no settings, because they are needed before any is read, or by clients only:

| Environment variable | What it is |
|---|---|
| `FORGEARR_HOME` | The folder that holds all state of an installation. Default: `~/.forgearr`. |
| `FORGEARR_URL` | The server that `forgearr jobs …` speaks to. Default: the one that runs in `FORGEARR_HOME`. |
| `FORGEARR_API_KEY` | The API key that `forgearr jobs …` shows to it. |
"""


def settings_page() -> str:
    """docs/settings.md as it should be."""
    defaults: dict[str, dict[str, Any]] = yaml.safe_load(files("configs").joinpath("forgearr.yaml").read_text())
    sections = [
        f"\n## {section}\n\n| Setting | Default | What it is | Environment variable |\n|---|---|---|---|\n"
        + "".join(
            f"| `{section}.{name}` | `{_as_yaml(defaults[section][name])}` | {field.description} "
            f"| `{ENVIRONMENT_PREFIX}{section.upper()}__{name.upper()}` |\n"
            for name, field in model.annotation.model_fields.items()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        )
        for section, model in Settings.model_fields.items()
    ]
    return SETTINGS_PAGE + "".join(sections)


def jobs_page() -> str:
    """docs/jobs.md with the table of kinds as it should be."""
    ours = [kind for kind in kinds().values() if kind.entrypoint.partition(".")[0] in CODE_FOLDERS.split("|")]
    rows = [
        f"| `{kind.name}` | `{_path_of(kind.entrypoint.partition(':')[0])}` "
        f"| `{_path_of(kind.spec.__module__)}:{kind.spec.__name__}` | {kind.description} |\n"
        for kind in sorted(ours, key=lambda kind: kind.entrypoint)
    ]
    return re.sub(KINDS_TABLE, lambda found: found[1] + "".join(rows), _text("jobs.md"), flags=re.MULTILINE)


def _path_of(module: str) -> str:
    return f"{module.replace('.', '/')}.py"


def test_every_setting_is_documented() -> None:
    assert (DOCS / "settings.md").read_text() == settings_page(), "run `make docs`"


def test_every_kind_is_documented(home: Path) -> None:
    assert jobs_page().count("\n| `") > len(kinds())
    assert _text("jobs.md") == jobs_page(), "run `make docs`"


def test_every_route_is_documented(home: Path) -> None:
    row = re.compile(r"^\| (GET|HEAD|POST|PUT|PATCH|DELETE|WebSocket) \| `(\S+)` \|", re.MULTILINE)
    documented = row.findall(_text("api.md"))
    assert len(documented) == len(set(documented))
    assert set(documented) == {*_operations(), *_sockets()}


def test_the_table_of_routes_names_those_for_administrators() -> None:
    from serve.http.marks import access_of
    from serve.http.mounts import methods_of
    from serve.routes import MOUNTS

    rows = re.findall(r"^\| (\w+) \| `(\S+)` \| .* Administrators\. \| `\S+` \|$", _text("api.md"), re.MULTILINE)
    routes = [route for mount in MOUNTS for route in mount.routes if access_of(route) == "admin"]
    assert {(method.upper(), path) for method, path in rows} == {
        (method, route.path_format) for route in routes for method in methods_of(route)
    }


def test_every_command_is_documented() -> None:
    documented = re.findall(r"^\| `forgearr ([a-z]+(?: [a-z]+)?)[ `]", _text("operating.md"), re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert set(documented) == set(_commands(typer.main.get_command(command_line)))


def test_each_room_is_on_the_page_of_the_architecture() -> None:
    page = _text("architecture.md")
    for package in ("cluster", "jobs", "pipelines", "serve"):
        for init in sorted((ROOT / package).rglob("__init__.py")):
            said = ast.get_docstring(ast.parse(init.read_text()))
            assert said, f"{init} has no docstring"
            sentence = " ".join(said.split("\n\n")[0].split())
            assert f"| `{init.parent.relative_to(ROOT)}/` | {sentence} |" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    unknown = {
        *(f"forgearr {said}" for said in _said_commands(text) if not _is_command(said)),
        *(link for link in _relative_links(text) if not _resolves(page, link)),
        *(name for name in re.findall(r"\bFORGEARR_[A-Z_]+\b", text) if not _is_variable(name)),
        *(span for span in _spans(text) if not _is_setting_or_module(span)),
        *(place for place in _places(text) if not _is_place(place)),
    }
    assert not unknown


def test_the_decisions_are_numbered_and_listed() -> None:
    decisions = sorted((DOCS / "adr").glob("*.md"))
    assert [int(path.name[:4]) for path in decisions] == list(range(1, len(decisions) + 1))
    for path in decisions:
        lines = path.read_text().splitlines()
        assert lines[0].startswith(f"# {int(path.name[:4])}. "), path
        assert [line for line in lines if line.startswith("## ")] == ["## Context", "## Decision", "## Consequences"]
        assert f"(adr/{path.name})" in _text("architecture.md"), f"architecture.md does not list {path.name}"


def test_the_changelog_is_one() -> None:
    """Keep a Changelog: versions, newest first, with known kinds of change under each."""
    title, *versions = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert title.startswith("# Changelog\n")
    released = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - \d{4}-\d\d-\d\d", text.splitlines()[0]) for text in versions]
    if versions[0].startswith("[Unreleased]"):
        released = released[1:]
    numbers = [tuple(map(int, match.groups())) for match in released if match]
    assert len(numbers) == len(released)
    assert numbers == sorted(numbers, reverse=True)
    for text in versions:
        changes = re.findall(r"^### (.*)\n\n- ", text, re.MULTILINE)
        assert changes
        assert set(changes) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    current = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert versions[0].startswith(("[Unreleased]", f"[{current}]"))


@pytest.mark.deep
@pytest.mark.platform
def test_the_kind_in_the_guide_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", _text("jobs.md"), re.MULTILINE | re.DOTALL)
    (tmp_path / "wordcount.py").write_text(example)
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("first.txt", "second.txt"):
        (texts / name).write_text("one two three\n" * 20_001)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with running_platform({"jobs.modules": "[jobs.sweep, wordcount]", "mlflow.enabled": "false"}) as platform:
        job = platform.wait_for(platform.submit("count_folder", spec={"folder": str(texts)}))
        assert job["error"] is None
        assert job["result"]["words"] == 2 * 3 * 20_001
        assert Path(job["result"]["table"]).read_text().splitlines() == ["first.txt,60003", "second.txt,60003"]


def _as_yaml(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).strip().removesuffix("...").strip()


def _text(name: str) -> str:
    return (DOCS / name).read_text()


def _operations() -> Iterator[tuple[str, str]]:
    from serve.app import create_app

    for path, operations in create_app().openapi()["paths"].items():
        for method in operations:
            yield method.upper(), path


def _sockets() -> Iterator[tuple[str, str]]:
    """OpenAPI does not speak of WebSockets."""
    from serve.routes import MOUNTS

    for mount in MOUNTS:
        for route in mount.routes:
            if isinstance(route, APIWebSocketRoute):
                yield "WebSocket", route.path


def _commands(group: Any, prefix: str = "") -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name


def _said_commands(text: str) -> list[str]:
    """`up` or `jobs submit`, wherever code calls `forgearr`."""
    code = "\n".join([*re.findall(BLOCK, text, re.MULTILINE | re.DOTALL), *_spans(text)])
    return [said.strip() for said in re.findall(r"(?:^|[\s/(])forgearr ([a-z]+(?: [a-z]+)?)", code, re.MULTILINE)]


def _is_command(said: str) -> bool:
    """Whether it is a command, or a group of them; a command may be followed by another word."""
    known = set(_commands(typer.main.get_command(command_line)))
    groups = {command.split()[0] for command in known if " " in command}
    return said in known | groups or (said.split()[0] in known - groups)


def _spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(BLOCK, "", text, flags=re.MULTILINE | re.DOTALL))


def _relative_links(text: str) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


def _resolves(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = (page.parent / path) if path else page
    return target.exists() and (not anchor or anchor in _anchors(target.read_text()))


def _anchors(text: str) -> set[str]:
    """The headings' addresses, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _is_variable(name: str) -> bool:
    section, _, setting = name.removeprefix(ENVIRONMENT_PREFIX).lower().partition("__")
    return name in RESERVED_VARIABLES or name == ENVIRONMENT_PREFIX or _is_setting(section, setting)


def _is_setting_or_module(span: str) -> bool:
    """Of a span such as `serve.port` or `jobs.sweep`; any other is not our concern."""
    match = re.fullmatch(r"([a-z]+)\.([a-z_]+)(=.*)?", span)
    if match is None or match[1] not in Settings.model_fields or span in get_args(Action):
        return True
    return _is_setting(match[1], match[2]) or (ROOT / match[1] / f"{match[2]}.py").exists()


def _is_setting(section: str, name: str) -> bool:
    model: Any = Settings.model_fields[section].annotation if section in Settings.model_fields else None
    return model is not None and name in model.model_fields


def _places(text: str) -> list[str]:
    """Paths in the repository, with the name of something in that file when there is a colon."""
    return [span for span in _spans(text) if re.fullmatch(rf"(?:{CODE_FOLDERS})/[\w./-]*(?::[\w.]+)?", span)]


def _is_place(place: str) -> bool:
    path, _, name = place.partition(":")
    if not (ROOT / path).exists():
        return False
    if not name:
        return True
    code = (ROOT / path).read_text()
    defined = (rf"^\s*(?:(?:async )?def|class) {part}\b|^{part}\b.* = " for part in name.split("."))
    return all(re.search(pattern, code, re.MULTILINE) for pattern in defined)


if __name__ == "__main__":
    (DOCS / "settings.md").write_text(settings_page())
    (DOCS / "jobs.md").write_text(jobs_page())
