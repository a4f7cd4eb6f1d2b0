"""Write samples to a file that can become a dataset."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipelines.training.data.parsing import EmptyData, to_json_line
from pipelines.training.data.samples import PreferencePair, Sample


@dataclass(frozen=True)
class SampleFile:
    """A file of valid samples, one canonical line each."""

    path: Path
    kind: str
    digest: str
    samples: int
    bytes: int


def write_samples(samples: Iterable[Sample | PreferencePair], path: Path, source: str) -> SampleFile:
    """Write samples one by one, so that they need not fit into memory. Raises EmptyData if there are none."""
    digest, count, kind = hashlib.sha256(), 0, ""
    with path.open("wb") as file:
        for sample in samples:
            line = to_json_line(sample)
            digest.update(line)
            file.write(line)
            count += 1
            kind = "chat" if isinstance(sample, Sample) else "preference"
    if not count:
        raise EmptyData(f"There is no sample in {source}.")
    return SampleFile(path, kind, digest.hexdigest(), count, path.stat().st_size)
