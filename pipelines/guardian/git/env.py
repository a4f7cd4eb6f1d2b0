"""How git is called: only to read, or to fetch what it was told to; and so that no repository makes it run anything.

A repository may bring its own configuration, and that may name programs. What could start one is overruled here.
"""

import os
import re
from collections.abc import Mapping

HOOK_VARIABLES = {
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR",
    "GIT_CONFIG",
    "GIT_CONFIG_COUNT",
    "GIT_CONFIG_PARAMETERS",
    "GIT_DIR",
    "GIT_EXTERNAL_DIFF",
    "GIT_GRAFT_FILE",
    "GIT_IMPLICIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_NAMESPACE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_PREFIX",
    "GIT_QUARANTINE_PATH",
    "GIT_REPLACE_REF_BASE",
    "GIT_SHALLOW_FILE",
    "GIT_WORK_TREE",
}
"""What git tells the hooks that it runs. Whoever was started by one would look into the wrong repository."""

SAFE_CONFIG = {
    "safe.directory": "*",  # its owner may be somebody else: nothing of it is run
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "core.attributesFile": os.devnull,
    "core.bigFileThreshold": "16m",  # what is larger is binary, and never in memory
    "core.quotePath": "false",
    "protocol.ext.allow": "never",
}


def git_environment(settings: Mapping[str, str] | None = None, protocols: str = "none") -> dict[str, str]:
    """The variables for git, with these settings above all others."""
    for name in HOOK_VARIABLES & os.environ.keys():
        del os.environ[name]
    config = {**SAFE_CONFIG, **(settings or {})}
    variables = {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "",
        "SSH_ASKPASS": "",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_ALLOW_PROTOCOL": protocols,
        "GIT_SSH_COMMAND": os.environ.get("GIT_SSH_COMMAND")
        or "ssh -o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=15",
        "GIT_CONFIG_COUNT": str(len(config)),
    }
    for number, (name, value) in enumerate(config.items()):
        variables[f"GIT_CONFIG_KEY_{number}"], variables[f"GIT_CONFIG_VALUE_{number}"] = name, value
    return variables


def first_error(output: str) -> str:
    """What git gave up over: it may go on to say what to do about it."""
    error = re.search(r"^(?:fatal|error): (.+)$", output, re.MULTILINE)
    return error[1][:300] if error else last_line(output)


def last_line(output: str | bytes) -> str:
    """The last line that git has printed, of which a progress bar draws many over each other."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    return lines[-1][:300] if lines else ""
