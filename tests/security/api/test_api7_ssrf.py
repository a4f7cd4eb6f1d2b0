"""API7, server side request forgery: what a user who may name an address or a folder wants from the network."""

import os
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cluster.services.http.urls import InvalidServiceUrl
from cluster.services.http.urls import validate_url as validate_service_url
from cluster.settings import get_settings
from pipelines.guardian.git import mirrors
from pipelines.guardian.git.locations import FolderOutside
from pipelines.guardian.git.mirrors import FetchFailed
from pipelines.guardian.git.repo import validate_path
from pipelines.guardian.git.urls import InvalidAddress, RemoteRepository, resolve_address
from tests.support.git_repos import commit_files, git, new_repository
from tests.support.waiting import TIMEOUT

METADATA = {
    "of-aws": "169.254.169.254",
    "of-aws-over-ipv6": "fd00:ec2::254",
    "of-google-over-ipv6": "fd20:ce::254",
    "of-azure": "168.63.129.16",
    "of-oracle": "192.0.0.192",
    "of-alibaba": "100.100.100.200",
    "as-an-ipv4-mapped-address": "::ffff:169.254.169.254",
    "as-an-ipv4-compatible-address": "::169.254.169.254",
    "through-nat64": "64:ff9b::a9fe:a9fe",
    "through-a-local-nat64": "64:ff9b:1::169.254.169.254",
    "through-nat64-to-azure": "64:ff9b::168.63.129.16",
    "through-6to4": "2002:a9fe:a9fe::1",
    "through-teredo": "2001:0:a9fe:a9fe::1",
}


@pytest.mark.parametrize("address", METADATA.values(), ids=METADATA)
def test_reach_the_metadata_service(address: str) -> None:
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(InvalidServiceUrl, match="No service may have the address"):
        validate_service_url(f"http://{host}/latest")
    with pytest.raises(InvalidAddress, match="its address is not allowed"):
        resolve_address(address, 443)


@pytest.mark.parametrize("address", ["192.168.1.20", "10.0.0.1", "127.0.0.1", "::1", "fd12::20", "64:ff9b::a00:1"])
def test_services_of_the_home_are_reached(address: str) -> None:
    host = f"[{address}]" if ":" in address else address
    assert validate_service_url(f"http://{host}:8989") == f"http://{host}:8989"
    assert resolve_address(address, 443) == host


def test_lead_ssh_to_another_address_than_the_one_that_was_checked(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real ssh would ask DNS again. Only our look-up knows this name, so ssh must get the address from us."""
    get_address_info = socket.getaddrinfo

    def resolve(host: str, *arguments: Any, **options: Any) -> Any:
        return get_address_info("127.0.0.1" if host == "rebound.invalid" else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with ssh_listener() as (port, greetings):
        remote = RemoteRepository(f"ssh://git@rebound.invalid:{port}/work.git", None)
        with pytest.raises(FetchFailed):
            mirrors.fetch(tmp_path / "mirror.git", remote, [], lambda _: None)
    assert [greeting[:8] for greeting in greetings] == [b"SSH-2.0-"]


@contextmanager
def ssh_listener() -> Generator[tuple[int, list[bytes]]]:
    """Accept one connection, and close it after the first line of the client."""
    greetings: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):  # nobody came
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(b"SSH-2.0-test\r\n")
                    greetings.append(connection.recv(255))

        thread = Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1], greetings
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(TIMEOUT)


@pytest.fixture
def outside(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a repository that is not in guardian.roots, which is `projects`."""
    (tmp_path / "projects").mkdir()
    monkeypatch.setenv("FORGEARR_GUARDIAN__ROOTS", f"[{tmp_path / 'projects'}]")
    get_settings.cache_clear()
    folder = new_repository(tmp_path / "private")
    commit_files(folder, "Secret", {"secret.txt": "hunter22\n"})
    return folder


def link(objects: Path, target: str) -> None:
    (objects / "info" / "alternates").write_text(f"{target}\n")


def link_relatively(objects: Path, target: str) -> None:
    link(objects, os.path.relpath(target, objects))


def link_in_quotes(objects: Path, target: str) -> None:
    link(objects, f'"{target}"')


def chain(objects: Path, target: str) -> None:
    """An alternate inside of the roots, whose own alternate is outside."""
    between = new_repository(objects.parents[2] / "between") / ".git" / "objects"
    link(between, target)
    link(objects, f"# a comment\n\n{between}")


def symlink(objects: Path, target: str) -> None:
    (objects / "00").symlink_to(target)


@pytest.mark.parametrize("way", [link, link_relatively, link_in_quotes, chain, symlink])
def test_read_objects_of_a_repository_outside_of_the_roots(
    way: Callable[[Path, str], None], outside: Path, tmp_path: Path
) -> None:
    folder = new_repository(tmp_path / "projects" / "work")
    commit_files(folder, "First", {"a.txt": "1\n"})
    way(folder / ".git" / "objects", str(outside / ".git" / "objects"))
    with pytest.raises(FolderOutside, match="refers to a folder outside"):
        validate_path(str(folder))


def test_alternates_inside_of_the_roots_are_read(outside: Path, tmp_path: Path) -> None:
    folder = new_repository(tmp_path / "projects" / "work")
    commit_files(folder, "First", {"a.txt": "1\n"})
    git(tmp_path / "projects", "clone", "--shared", str(folder), "copy")
    assert validate_path(str(tmp_path / "projects" / "copy")) == tmp_path / "projects" / "copy"
