"""Processes that this installation starts, and what a crash of it left behind.

Every process that `forgearr up` starts carries a mark in its environment, which its own children inherit: Ray's
workers, HAProxy, the commands of `ray job submit`. So whatever belongs to an installation can be found, and nothing
else can be mistaken for it.
"""

import asyncio
import ctypes
import errno
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from cluster.errors import ForgearrError
from cluster.settings import home

MARKER_VARIABLE = "FORGEARR_RUNTIME"
JOB_NICENESS = 10
"""How far jobs stand back, as a niceness."""
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


class PortUnavailable(ForgearrError):
    """A port that Forgearr needs is not available."""

    code = "PORT_UNAVAILABLE"


def marked_environment() -> dict[str, str]:
    """This process's environment for a child: absolute home, this Python first in PATH, and the mark."""
    environment = dict(os.environ)
    environment["FORGEARR_HOME"] = environment[MARKER_VARIABLE] = str(home())
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return environment


async def start(
    command: Sequence[str], environment: Mapping[str, str], log: Path, stdout: int | None = None
) -> asyncio.subprocess.Process:
    """Start a child in a session of its own, so that Ctrl-C reaches only us; it does not outlive us (on Linux)."""
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output if stdout is None else stdout,
            stderr=output,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )


async def stop(process: asyncio.subprocess.Process, grace_seconds: float) -> None:
    """End a child: politely, then, when it has not gone in time, by force."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), grace_seconds)
    except TimeoutError:
        process.kill()
        await process.wait()


def lower_priority() -> None:
    """Let those who answer people go first: before this thread, and whatever it starts."""
    os.setpriority(os.PRIO_PROCESS, 0, max(JOB_NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))


def marked_processes() -> list[psutil.Process]:
    """Every other process that carries this installation's mark."""
    return [process for process in psutil.process_iter() if process.pid != os.getpid() and _is_marked(process)]


def find_by_command(text: str) -> psutil.Process | None:
    """The process of this installation, on this machine, with these words in its command line."""
    for process in marked_processes():
        try:
            if text in " ".join(process.cmdline()):
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def end_leftovers(grace_seconds: float = 3) -> int:
    """End them all, and say how many there were."""
    ended_pids: set[int] = set()
    while found := marked_processes():  # one that was about to start a child when it ended is why we look again
        _send_signal(found, signal.SIGTERM)
        _, survivors = psutil.wait_procs(found, timeout=grace_seconds)
        _send_signal(survivors, signal.SIGKILL)
        psutil.wait_procs(survivors, timeout=grace_seconds)
        ended_pids |= {process.pid for process in found}
    return len(ended_pids)


def find_process(pid: int, create_time: float) -> psutil.Process | None:
    """The process that had this pid when it was noted down, if it is still the same one."""
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - create_time) < 1 and process.status() != psutil.STATUS_ZOMBIE
        return process if same else None
    except psutil.NoSuchProcess:
        return None


def require_free_port(host: str, port: int, setting: str) -> None:
    """Refuse, in one sentence, to start where something else listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortUnavailable(_port_error_message(error, host, port, setting)) from None


def is_listening(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2):
            return True
    except OSError:
        return False


def is_reachable(address: str) -> bool:
    """Whether something listens at `host:port`."""
    host, _, port = address.rpartition(":")
    return is_listening(host, int(port))


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    """Runs in the child before it becomes its command: the kernel ends it when this process is killed."""
    assert _libc is not None
    _libc.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _is_marked(process: psutil.Process) -> bool:
    try:
        return process.environ().get(MARKER_VARIABLE) == str(home())
    except (psutil.Error, OSError):
        return False  # it ended meanwhile, or it is another user's, whose environment we may not read


def _send_signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue  # it ended meanwhile, which is what we want


def _port_error_message(error: OSError, host: str, port: int, setting: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"Port {port} is taken{_port_owner(port)}: stop that, or choose another one with "
            f"`forgearr up --set {setting}={port + 10}`."
        )
    if error.errno == errno.EACCES:
        return f"This account may not use port {port}: choose one above 1023 with `--set {setting}=…`."
    return f"Nothing can listen on {host}, port {port} ({error.strerror}): see serve.host and {setting}."


def _port_owner(port: int) -> str:
    try:
        listeners = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        return ""  # some systems show connections to an administrator only
    for listener in listeners:
        if listener.status == psutil.CONN_LISTEN and listener.laddr[1:] == (port,) and listener.pid:
            try:
                return f" by process {listener.pid} ({psutil.Process(listener.pid).name()})"
            except psutil.NoSuchProcess:
                return ""
    return " by another process"
