"""One step of a job in a process of its own.

llama.cpp ends its process over a file that it does not like, its converter belongs to an environment of its own, and
neither can be interrupted from inside. Here a step may crash, be killed when its job is stopped, and gives its memory
back when it is done.

The function is named by its import path, takes and returns JSON, and reports its progress through `report`.
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

LAST_LINES = 6
"""How much of what a failed step has printed its error repeats."""
LOOK_SECONDS = 0.2
PROJECT = Path(__file__).parents[2]

Report = Callable[[float, str], None]
"""Hears which part of the step is done, from 0 to 1, and what it is doing."""


class StepFailed(ForgearrError):
    """A step of the job ended in an error."""

    code = "STEP_FAILED"


class Interrupted(Exception):
    """The step was killed, because its job should stop."""


def run(
    function: str,
    request: Mapping[str, Any],
    *,
    report: Report,
    should_stop: Callable[[], bool],
    threads: int,
    paths: Sequence[Path] = (),
) -> Any:
    """Call `module:function` with this request, in a process with `paths` before all else that it imports from.

    Raises Interrupted when the job should stop.
    """
    command = [sys.executable, "-P", "-m", "jobs.execution.isolated", function, json.dumps(request)]
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
    answers: list[dict[str, Any]] = []
    printed: deque[str] = deque(maxlen=200)
    news = _News()
    readers = [
        threading.Thread(target=_read_answers, args=(process.stdout, answers, news), daemon=True),
        threading.Thread(target=_read_printed, args=(process.stderr, printed, news), daemon=True),
    ]
    try:
        for reader in readers:
            reader.start()
        while process.poll() is None:
            if should_stop():
                raise Interrupted
            if told := news.take():
                report(*told)
            news.arrived.wait(LOOK_SECONDS)
            news.arrived.clear()
    finally:
        process.kill()
        process.wait()
        for reader in readers:
            reader.join()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()
    return _outcome(function, process.returncode, answers, printed, news.last)


class _News:
    """The newest progress of a step, told by its threads and taken by the job's."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self._told: tuple[float, str] | None = None
        self.last = "starting"
        self._part = 0.0

    def tell(self, part: float, doing: str) -> None:
        self._part = max(part, self._part)  # a second bar begins at 0 again
        self._told, self.last = (self._part, doing), doing
        self.arrived.set()

    def take(self) -> tuple[float, str] | None:
        told, self._told = self._told, None
        return told


def _environment(threads: int, paths: Sequence[Path]) -> dict[str, str]:
    found = [*map(str, paths), str(PROJECT), os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(one for one in found if one),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def _read_answers(stream: IO[bytes], answers: list[dict[str, Any]], news: _News) -> None:
    for line in stream:
        told = json.loads(line)
        if "part" in told:
            news.tell(told["part"], told["doing"])
        else:
            answers.append(told)
    news.arrived.set()


def _read_printed(stream: IO[bytes], printed: deque[str], news: _News) -> None:
    """Lines, of which a progress bar draws many over each other."""
    rest = ""
    while chunk := os.read(stream.fileno(), 65_536):
        *lines, rest = re.split(r"[\r\n]", rest + chunk.decode(errors="replace"))
        for line in lines:
            if bar := re.match(r"Writing:\s+(\d+)%", line):
                news.tell(int(bar[1]) / 100, "converting")
            elif line.strip():
                printed.append(line.strip())
    if rest.strip():
        printed.append(rest.strip())


def _outcome(function: str, code: int, answers: list[dict[str, Any]], printed: deque[str], doing: str) -> Any:
    answer = answers[-1] if answers else {}
    if "result" in answer:
        return answer["result"]
    if "error" in answer:
        module, _, name = answer["error"].partition(":")
        raise getattr(import_module(module), name)(answer["message"])
    last = " | ".join(list(printed)[-LAST_LINES:]) or "it said nothing"
    ended = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
    name = function.partition(":")[2]
    raise StepFailed(f"The step {name} {ended} while {doing}: {last}", details={"printed": list(printed)})


def main() -> None:
    """The process's side."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, _, name = sys.argv[1].partition(":")

    def report(part: float, doing: str) -> None:
        print(json.dumps({"part": part, "doing": doing}), file=answers, flush=True)

    try:
        answer = {"result": getattr(import_module(module), name)(report=report, **json.loads(sys.argv[2]))}
    except ForgearrError as error:
        answer = {"error": f"{type(error).__module__}:{type(error).__name__}", "message": error.message}
    except Exception:
        traceback.print_exc()
        os._exit(1)
    print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # what was made is written; tearing down large libraries would only take time


def _end_with_parent() -> None:
    """The pipe to a parent that has died reads as ended."""
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
