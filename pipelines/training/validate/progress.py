"""What a job has measured so far: told in its progress, and kept in storage for the next attempt."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster import storage
from jobs.context import Context
from pipelines.training.validate.metrics import Interrupted

SAVE_SECONDS = 20

Row = dict[str, Any]
"""What one sample has given with one model."""


class Measurements:
    def __init__(
        self,
        context: Context,
        place: Path,
        total: int,
        titles: Mapping[str, str],
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """`total` rows are wanted. What was measured under other `facts` does not count."""
        self._context = context
        self._file = place / "measured.json"
        self._total = total
        self._titles = titles
        self._facts = dict(facts or {})
        self._saved_at = time.monotonic()
        kept = context.checkpoint_state
        known = json.loads(storage.read(kept["measured"])) if kept and kept["facts"] == self._facts else {}
        self.rows: dict[str, list[Row]] = known

    def lacks(self, which: str, count: int) -> bool:
        return len(self.rows.get(which, [])) < count

    def follow(self, which: str, count: int, some: Callable[[int], list[Row]]) -> None:
        """Measure one model on what is missing of `count` samples, `some` from a number on at a time."""
        rows = self.rows.setdefault(which, [])
        while len(rows) < count:
            done = sum(len(one) for one in self.rows.values())
            phase = f"measuring the {self._titles[which]}: {len(rows)} of {count} samples"
            self._context.report(progress=5 + 90 * done / self._total, phase=phase)
            try:
                rows += some(len(rows))
            except Interrupted:
                self._save()
            if self._context.should_stop() or time.monotonic() - self._saved_at > SAVE_SECONDS:
                self._save()

    def _save(self) -> None:
        self._file.write_text(json.dumps(self.rows))
        self._context.checkpoint({"measured": storage.save(self._file, _name(self._context)), "facts": self._facts})
        self._saved_at = time.monotonic()


def settle(context: Context, result: Mapping[str, Any]) -> None:
    """The result is safe before what it was made from is removed: an attempt that ends in between has it."""
    context.checkpoint({"result": result})
    storage.remove(storage.address(_name(context)))


def _name(context: Context) -> str:
    return f"jobs/{context.job_id}/measured.json"
