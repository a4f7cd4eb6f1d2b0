"""The step of our export that converts. `python -m tests.bench.our_conversion MODEL FILE OUTTYPE SCRIPTS`."""

import sys
import time
from pathlib import Path

from jobs.execution import isolated
from pipelines.training.export import convert as conversion


def convert(model: str, file: str, outtype: str, scripts: Path) -> float:
    request = {
        "model": model,
        "base": None,
        "file": file,
        "outtype": outtype,
        "adapter_file": None,
        "work": str(Path(file).parent),
    }
    started = time.perf_counter()
    isolated.run_isolated(
        conversion.convert,
        request,
        report=lambda part, doing: None,
        should_stop=lambda: False,
        threads=1,
        paths=(scripts / "gguf-py", scripts),
    )
    return time.perf_counter() - started


if __name__ == "__main__":
    model, file, outtype, scripts = sys.argv[1:]
    print(convert(model, file, outtype, Path(scripts)))
