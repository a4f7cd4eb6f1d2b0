"""Load on a URL from wrk (Debian's package of that name): one thread, keep-alive connections."""

import re
import shutil
import subprocess
from pathlib import Path


def requests_per_second(url: str, connections: int, seconds: int, script: Path | None = None) -> float:
    assert shutil.which("wrk"), "wrk is not installed: apt-get install wrk"
    command = [
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds}",
        "--timeout=10s",
        *(["-s", str(script)] if script else []),
        url,
    ]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 30).stdout
    assert "Non-2xx" not in answer, answer
    assert "Socket errors" not in answer, answer
    found = re.search(r"Requests/sec:\s+([\d.]+)", answer)
    assert found, answer
    return float(found[1])
