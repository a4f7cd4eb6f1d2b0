"""Run one step of a job in a process of its own.

llama.cpp ends its process when it cannot read a file, its converter needs an import path of its own, and neither can be
interrupted from inside. In a process of its own, a step may crash, is killed when its job is stopped, and frees its
memory when it ends.

The function is one of a module, takes and returns JSON, and reports its progress through `report`.
"""

import json
import os
import re
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from cluster.errors import ForgearrError
from cluster.runtime.processes import MARKER_VARIABLE

MAX_ERROR_LINES = 6
"""The error of a failed step contains this many of its last output lines."""
INHERITED_VARIABLES = re.compile(
    rf"PATH|HOME|USER|LANG|TZ|TMPDIR|VIRTUAL_ENV|LD_LIBRARY_PATH|{MARKER_VARIABLE}|(LC|CUDA|NVIDIA|MALLOC|PYTHON)_?\w*"
)
POLL_SECONDS = 0.2
PROJECT = Path(__file__).parents[2]

OnProgress = Callable[[float, str], None]
"""Called with the part of the step that is done, from 0 to 1, and its phase."""


class StepFailed(ForgearrError):
    """A step of the job ended in an error."""

    code = "STEP_FAILED"


class StepInterrupted(Exception):
    """The step was killed, because its job should stop."""


def run_isolated(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    *,
    report: OnProgress,
    should_stop: Callable[[], bool],
    threads: int,
    paths: Sequence[Path] = (),
) -> Any:
    """Call a function of a module with these arguments, in a process whose import path begins with `paths`.

    Raises StepInterrupted when the job should stop.
    """
    path = f"{function.__module__}:{function.__name__}"
    command = [sys.executable, "-P", "-m", "jobs.execution.isolated", path, json.dumps(arguments)]
    process = subprocess.Popen(
        command,
        env=_environment(threads, paths),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    messages: list[dict[str, Any]] = []
    output_lines: deque[str] = deque(maxlen=200)
    progress = _StepProgress()
    readers = [
        threading.Thread(target=_read_messages, args=(process.stdout, messages, progress), daemon=True),
        threading.Thread(target=_read_output, args=(process.stderr, output_lines, progress), daemon=True),
    ]
    try:
        for reader in readers:
            reader.start()
        while process.poll() is None:
            if should_stop():
                raise StepInterrupted
            if update := progress.take():
                report(*update)
            progress.changed.wait(POLL_SECONDS)
            progress.changed.clear()
    finally:
        process.kill()
        process.wait()
        for reader in readers:
            reader.join()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()
    return _result_or_raise(function.__name__, process.returncode, messages, output_lines, progress.last_phase)


class _StepProgress:
    """The latest progress of a step, set by the threads that read its output, and taken by the job's thread."""

    def __init__(self) -> None:
        self.changed = threading.Event()
        self._update: tuple[float, str] | None = None
        self.last_phase = "starting"
        self._fraction = 0.0

    def set(self, fraction: float, phase: str) -> None:
        self._fraction = max(fraction, self._fraction)  # a second progress bar starts at 0 again
        self._update, self.last_phase = (self._fraction, phase), phase
        self.changed.set()

    def take(self) -> tuple[float, str] | None:
        update, self._update = self._update, None
        return update


def _environment(threads: int, paths: Sequence[Path]) -> dict[str, str]:
    """No settings and no tokens: a step reads models that anybody may have made."""
    entries = [*map(str, paths), str(PROJECT), os.environ.get("PYTHONPATH")]
    inherited = {name: value for name, value in os.environ.items() if INHERITED_VARIABLES.fullmatch(name)}
    return {
        **inherited,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(entry for entry in entries if entry),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def _read_messages(stream: IO[bytes], messages: list[dict[str, Any]], progress: _StepProgress) -> None:
    for line in stream:
        message = json.loads(line)
        if "part" in message:
            progress.set(message["part"], message["doing"])
        else:
            messages.append(message)
    progress.changed.set()


def _read_output(stream: IO[bytes], output_lines: deque[str], progress: _StepProgress) -> None:
    """Read lines of output. The parts of a progress bar, separated by carriage returns, count as lines too."""
    remainder = ""
    while chunk := os.read(stream.fileno(), 65_536):
        *lines, remainder = re.split(r"[\r\n]", remainder + chunk.decode(errors="replace"))
        for line in lines:
            if match := re.match(r"Writing:\s+(\d+)%", line):
                progress.set(int(match[1]) / 100, "converting")
            elif line.strip():
                output_lines.append(line.strip())
    if remainder.strip():
        output_lines.append(remainder.strip())


def _result_or_raise(
    name: str, exit_code: int, messages: list[dict[str, Any]], output_lines: deque[str], phase: str
) -> Any:
    message = messages[-1] if messages else {}
    if "result" in message:
        return message["result"]
    if "error" in message:
        module, _, name = message["error"].partition(":")
        raise getattr(import_module(module), name)(message["message"])
    output_tail = " | ".join(list(output_lines)[-MAX_ERROR_LINES:]) or "it printed nothing"
    ending = f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with {exit_code}"
    raise StepFailed(f"The step {name} {ending} while {phase}: {output_tail}", details={"printed": list(output_lines)})


def main() -> None:
    """Run the function, in the step's process."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the messages
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, _, name = sys.argv[1].partition(":")

    def report(fraction: float, phase: str) -> None:
        print(json.dumps({"part": fraction, "doing": phase}), file=output, flush=True)

    try:
        message = {"result": getattr(import_module(module), name)(report=report, **json.loads(sys.argv[2]))}
    except ForgearrError as error:
        message = {"error": f"{type(error).__module__}:{type(error).__name__}", "message": error.message}
    except Exception:
        traceback.print_exc()
        os._exit(1)
    print(json.dumps(message), file=output, flush=True)
    os._exit(0)  # the result is written; unloading large libraries would only take time


def _end_with_parent() -> None:
    """End this process when its parent has died: then the pipe from it is at its end."""
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
