"""Measure samples in resumable parts: report the progress, and store the rows in storage for the next attempt."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster import storage
from jobs.context import Context
from pipelines.training.validate.metrics import MeasurementInterrupted

SAVE_SECONDS = 20

Row = dict[str, Any]
"""The metrics of one sample with one model."""


class Measurements:
    def __init__(
        self,
        context: Context,
        folder: Path,
        total: int,
        titles: Mapping[str, str],
        conditions: Mapping[str, Any] | None = None,
    ) -> None:
        """`total` is the number of rows to measure. Stored rows are used only if `conditions` were the same."""
        self._context = context
        self._file = folder / "measured.json"
        self._total = total
        self._titles = titles
        self._conditions = dict(conditions or {})
        self._saved_at = time.monotonic()
        state = context.checkpoint_state
        self._stored_at: str | None = state["measured"] if state else None
        rows = json.loads(storage.read(state["measured"])) if state and state["facts"] == self._conditions else {}
        self.rows: dict[str, list[Row]] = rows

    def needs_more(self, model_key: str, count: int) -> bool:
        return len(self.rows.get(model_key, [])) < count

    def measure_missing(self, model_key: str, count: int, measure_from: Callable[[int], list[Row]]) -> None:
        """Measure one model until it has `count` rows. `measure_from(start)` measures some samples from `start` on."""
        rows = self.rows.setdefault(model_key, [])
        while len(rows) < count:
            done = sum(len(model_rows) for model_rows in self.rows.values())
            phase = f"measuring the {self._titles[model_key]}: {len(rows)} of {count} samples"
            self._context.report(progress=5 + 90 * done / self._total, phase=phase)
            try:
                rows += measure_from(len(rows))
            except MeasurementInterrupted:
                self._save()
            if self._context.should_stop() or time.monotonic() - self._saved_at > SAVE_SECONDS:
                self._save()

    def _save(self) -> None:
        self._file.write_text(json.dumps(self.rows))
        address = storage.save(self._file, self._context.storage_name("measured.json"))
        self._context.checkpoint({"measured": address, "facts": self._conditions})
        if self._stored_at and self._stored_at != address:  # by an earlier attempt
            storage.remove(self._stored_at)
        self._stored_at, self._saved_at = address, time.monotonic()


def save_result(context: Context, result: Mapping[str, Any]) -> None:
    """Checkpoint the result, and only then remove the stored rows: an attempt that ends in between loses nothing."""
    stored_at = (context.checkpoint_state or {}).get("measured")
    context.checkpoint({"result": result})
    if stored_at is not None:
        storage.remove(stored_at)
