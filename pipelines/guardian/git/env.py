"""The environment of git processes, which keeps repositories from running programs, and the parsing of git's errors.

The configuration of a repository may name programs. All options that could start one are overridden here.
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence

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
"""Variables that git sets for hooks. A process that a hook started would read the wrong repository."""

SAFE_CONFIG = {
    "safe.directory": "*",  # the repository may belong to another account: nothing in it is run
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "core.attributesFile": os.devnull,
    "core.bigFileThreshold": "16m",  # larger files count as binary, and are not loaded into memory
    "core.quotePath": "false",
    "protocol.ext.allow": "never",
}

SSH_COMMAND = "ssh -o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=15"


def git_environment(
    settings: Mapping[str, str] | None = None, protocols: str = "none", ssh_options: Sequence[str] = ()
) -> dict[str, str]:
    """The environment variables for git. `settings` override all other configuration."""
    for name in HOOK_VARIABLES & os.environ.keys():
        del os.environ[name]
    config = {**SAFE_CONFIG, **(settings or {})}
    ssh = os.environ.get("GIT_SSH_COMMAND") or SSH_COMMAND
    variables = {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "",
        "SSH_ASKPASS": "",
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_NO_REPLACE_OBJECTS": "1",
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_ATTR_NOSYSTEM": "1",
        "GIT_ALLOW_PROTOCOL": protocols,
        "GIT_SSH_COMMAND": " ".join([ssh, *(f"-o {shlex.quote(option)}" for option in ssh_options)]),
        "GIT_CONFIG_COUNT": str(len(config)),
    }
    for number, (name, value) in enumerate(config.items()):
        variables[f"GIT_CONFIG_KEY_{number}"], variables[f"GIT_CONFIG_VALUE_{number}"] = name, value
    return variables


def first_error(output: str) -> str:
    """The first error in git's output, which may be followed by advice."""
    error = re.search(r"^(?:fatal|error): (.+)$", output, re.MULTILINE)
    return error[1][:300] if error else last_line(output)


def last_line(output: str | bytes) -> str:
    """The last line of git's output. Progress bars overwrite lines with carriage returns."""
    text = output.decode(errors="replace") if isinstance(output, bytes) else output
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    return lines[-1][:300] if lines else ""
