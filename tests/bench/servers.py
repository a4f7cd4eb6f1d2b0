"""Peers that are servers: started as programs, asked until they answer, ended with the measurement."""

import os
import subprocess
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.waiting import eventually

LOG_LINES = 30


@contextmanager
def running_server(
    command: Sequence[str | Path], url: str, log: Path, environment: Mapping[str, str] | None = None
) -> Generator[None]:
    """Run it until the block ends, which begins as soon as `url` answers. What it prints goes to `log`.

    A server that ends instead fails the measurement, with the last lines that it has printed.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
        )
        try:
            eventually(lambda: _answers(url) or process.poll() is not None)
            if process.poll() is not None:
                last_lines = "\n".join(log.read_text().splitlines()[-LOG_LINES:])
                raise RuntimeError(f"{command[0]} has ended with status {process.returncode}:\n{last_lines}")
            yield
        finally:
            process.kill()
            process.communicate()


def run(command: Sequence[str | Path]) -> None:
    """Run a command to its end; shows what it printed when it fails."""
    done = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} has failed:\n{done.stdout}{done.stderr}")


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False
