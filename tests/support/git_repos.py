"""Git repositories for tests, made by git itself."""

import os
import subprocess
from pathlib import Path

GIT_IDENTITY = {
    "GIT_AUTHOR_NAME": "Ada",
    "GIT_AUTHOR_EMAIL": "ada@example.com",
    "GIT_COMMITTER_NAME": "Ada",
    "GIT_COMMITTER_EMAIL": "ada@example.com",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
}


def git(folder: Path, *command: str, stdin: bytes | None = None) -> str:
    process = subprocess.run(
        ["git", "-c", "init.defaultBranch=main", "-c", "protocol.file.allow=always", *command],
        cwd=folder,
        env={**os.environ, **GIT_IDENTITY},
        input=stdin,
        capture_output=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr.decode()
    return process.stdout.decode(errors="replace").strip()


def new_repository(folder: Path) -> Path:
    folder.mkdir(parents=True)
    git(folder, "init")
    return folder


def commit_files(folder: Path, message: str, files: dict[str, str | bytes]) -> str:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    git(folder, "add", "--all")
    git(folder, "commit", "--allow-empty", "--message", message)
    return git(folder, "rev-parse", "HEAD")


def import_commits(folder: Path, count: int) -> str:
    """Import a history of this many commits; each changes a line of one file."""
    lines = ["blob", "mark :1", "data 3", "one"]
    for number in range(1, count + 1):
        text = f"line {number}\n"
        lines += [
            "commit refs/heads/main",
            f"committer Ada <ada@example.com> {1_700_000_000 + number} +0000",
            f"data {len(f'Change {number}')}",
            f"Change {number}",
            "M 100644 inline file.txt",
            f"data {len(text)}",
            text,
        ]
    git(folder, "fast-import", "--quiet", stdin="\n".join([*lines, ""]).encode())
    return git(folder, "rev-parse", "refs/heads/main")
