"""Start, find and stop the processes of this installation, and check ports.

Every process that `forgearr up` starts has a mark in its environment, which its children inherit: Ray's workers,
HAProxy, the commands of `ray job submit`. By this mark exactly the processes of this installation are found, also after
a crash.
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
"""The niceness of threads that run jobs."""
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


class PortUnavailable(ForgearrError):
    """A port that Forgearr needs is not available."""

    code = "PORT_UNAVAILABLE"


def marked_environment() -> dict[str, str]:
    """Return the environment for a child: ours, with an absolute home, this Python first in PATH, and the mark."""
    environment = dict(os.environ)
    environment["FORGEARR_HOME"] = environment[MARKER_VARIABLE] = str(home())
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return environment


async def start(
    command: Sequence[str], environment: Mapping[str, str], log: Path, stdout: int | None = None
) -> asyncio.subprocess.Process:
    """Start a child in a session of its own, so that Ctrl-C does not reach it. On Linux it ends with this process."""
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
    """Terminate a child. Kill it if it has not ended in time."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), grace_seconds)
    except TimeoutError:
        process.kill()
        await process.wait()


def lower_priority() -> None:
    """Lower the priority of this thread, and of what it starts, so that requests are answered first."""
    os.setpriority(os.PRIO_PROCESS, 0, max(JOB_NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))


def marked_processes() -> list[psutil.Process]:
    """Return all other processes with this installation's mark."""
    return [process for process in psutil.process_iter() if process.pid != os.getpid() and _is_marked(process)]


def find_by_command(text: str) -> psutil.Process | None:
    """Return a process of this installation, on this machine, whose command line contains `text`."""
    for process in marked_processes():
        try:
            if text in " ".join(process.cmdline()):
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def end_leftovers(grace_seconds: float = 3) -> int:
    """End all other processes of this installation, and return their number."""
    ended_pids: set[int] = set()
    while leftovers := marked_processes():  # repeated, because a process may start a child just before it ends
        _send_signal(leftovers, signal.SIGTERM)
        _, survivors = psutil.wait_procs(leftovers, timeout=grace_seconds)
        _send_signal(survivors, signal.SIGKILL)
        psutil.wait_procs(survivors, timeout=grace_seconds)
        ended_pids |= {process.pid for process in leftovers}
    return len(ended_pids)


def find_process(pid: int, create_time: float) -> psutil.Process | None:
    """Return the running process with this pid and start time. None if it has ended, or the pid was reused."""
    try:
        process = psutil.Process(pid)
        is_same = abs(process.create_time() - create_time) < 1 and process.status() != psutil.STATUS_ZOMBIE
        return process if is_same else None
    except psutil.NoSuchProcess:
        return None


def require_free_port(host: str, port: int, setting: str) -> None:
    """Raise an error that names the port and its setting if Forgearr cannot listen there."""
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
    """Called in the child before it executes its command: the kernel terminates it when this process dies."""
    assert _libc is not None
    _libc.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _is_marked(process: psutil.Process) -> bool:
    try:
        return process.environ().get(MARKER_VARIABLE) == str(home())
    except (psutil.Error, OSError):
        return False  # it has ended, or it belongs to another user, whose environment is not readable


def _send_signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue  # it has ended already


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
