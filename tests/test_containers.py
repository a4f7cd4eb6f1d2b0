"""The files for containers and Kubernetes fit the code. No container runs here: nothing more is known of them."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.routing import APIRoute

from cluster.cli import app as command_line
from cluster.settings import ENVIRONMENT_PREFIX, RESERVED_VARIABLES, Settings, load_settings
from serve.routes import MOUNTS
from tests.test_rooms import PACKAGES, ROOT

CONTAINERFILE = (ROOT / "configs" / "container" / "Containerfile").read_text()
MANIFEST = (ROOT / "configs" / "kubernetes" / "forgearr.yaml").read_text()


@pytest.fixture
def objects() -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(MANIFEST)}


@pytest.fixture
def pod(objects: dict[str, Any]) -> dict[str, Any]:
    return objects["StatefulSet"]["spec"]["template"]["spec"]


def test_no_container_has_more_rights_than_it_needs(pod: dict[str, Any]) -> None:
    account = pod["securityContext"]
    assert account["runAsNonRoot"] is True
    assert account["runAsUser"] > 0
    assert f"USER {account['runAsUser']}:{account['runAsGroup']}" in CONTAINERFILE
    assert (account["fsGroupChangePolicy"], account["seccompProfile"]) == ("OnRootMismatch", {"type": "RuntimeDefault"})
    assert (pod["automountServiceAccountToken"], pod["enableServiceLinks"]) == (False, False)
    for container in pod["initContainers"] + pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_what_is_written_is_on_volumes(objects: dict[str, Any], pod: dict[str, Any]) -> None:
    volumes = {volume["name"] for volume in pod["volumes"]}
    claims = {claim["metadata"]["name"] for claim in objects["StatefulSet"]["spec"]["volumeClaimTemplates"]}
    home = Path(re.findall(r"FORGEARR_HOME=(\S+)", CONTAINERFILE)[0])
    for container in pod["initContainers"] + pod["containers"]:
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts) == {str(home.parent), "/tmp", "/dev/shm"}
        assert set(mounts.values()) == volumes | claims
        assert mounts[str(home.parent)] in claims


def test_the_port_is_that_of_the_settings_and_the_probes_are_a_route(
    home: Path, objects: dict[str, Any], pod: dict[str, Any]
) -> None:
    port = load_settings().settings.serve.port
    (container,) = pod["containers"]
    assert (container["ports"], objects["Service"]["spec"]["ports"][0]["port"]) == (
        [{"name": "http", "containerPort": port}],
        port,
    )
    assert f"EXPOSE {port}\n" in CONTAINERFILE
    paths = {route.path_format for mount in MOUNTS for route in mount.routes if isinstance(route, APIRoute)}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in paths
        assert container[probe]["httpGet"]["port"] == "http"
    selector = objects["Service"]["spec"]["selector"]
    assert selector == objects["StatefulSet"]["spec"]["template"]["metadata"]["labels"]


def test_shared_memory_holds_the_object_store(home: Path, pod: dict[str, Any]) -> None:
    (memory,) = [volume for volume in pod["volumes"] if volume["name"] == "memory"]
    number, unit = re.fullmatch(r"(\d+)(Gi)", memory["emptyDir"]["sizeLimit"]).groups()  # pyright: ignore[reportOptionalMemberAccess]
    assert (int(number) * 1024**3, unit) > (load_settings().settings.ray.object_store_mb * 1_000_000, "Gi")


def test_every_variable_is_a_setting() -> None:
    variables = set(re.findall(rf"\b{ENVIRONMENT_PREFIX}[A-Z_]+\b", CONTAINERFILE + MANIFEST)) - {"FORGEARR_PORT"}
    known = {
        f"{ENVIRONMENT_PREFIX}{section}__{name}".upper()
        for section, field in Settings.model_fields.items()
        for name in field.annotation.model_fields  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    }
    assert variables
    assert variables <= known | RESERVED_VARIABLES


def test_every_command_exists() -> None:
    commands = {command.name for command in command_line.registered_commands}
    used = re.findall(r"\bforgearr (\w+)", MANIFEST.partition("args:")[2].partition("envFrom")[0])
    assert used == ["user", "user"]
    assert re.findall(r'^CMD \["(\w+)"\]', CONTAINERFILE, re.MULTILINE) == ["up"]
    assert "up" in commands


def test_the_container_has_all_packages_and_extras() -> None:
    copied = set(re.findall(r"^COPY (\w+) \1$", CONTAINERFILE, re.MULTILINE))
    assert copied == {*PACKAGES, "configs"}
    extras = re.findall(r"'\.\[([\w,]+)\]'", CONTAINERFILE)[0].split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras) == set(project["optional-dependencies"]) - {"dev", "gpu"}
    allowed = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert allowed == copied | set(re.findall(r"^COPY (\S+ .*) \./$", CONTAINERFILE, re.MULTILINE)[0].split())
