"""Store the metrics of each step of a training as a CSV file: the result file of OpenAI's fine-tuning jobs."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from cluster.db import Database, run_with_database
from cluster.files import store as file_store
from cluster.files.tables import File
from cluster.ownership import Principal
from jobs.tables import Job

CSV_COLUMNS = {
    "train_loss": ("loss",),
    "train_accuracy": ("mean_token_accuracy", "rewards/accuracies"),
    "valid_loss": ("eval_loss",),
    "valid_mean_token_accuracy": ("eval_mean_token_accuracy", "eval_rewards/accuracies"),
}
"""OpenAI's columns, and the trainer's metrics for them. The accuracy of DPO is how often the chosen answer wins."""


def save_file(history: Sequence[Mapping[str, float]], path: Path, job: Job) -> str:
    """Write the file, and upload it in the name of the job's owner. Returns its id."""
    write_csv(history, path)
    principal = Principal(id=job.owner_id, name=job.created_by)
    with path.open("rb") as content:

        async def create(database: Database) -> File:
            return await file_store.create_file(
                database,
                content,
                filename="step_metrics.csv",
                purpose="fine-tune-results",
                principal=principal,
                file_id=f"file-{job.id}",
            )

        return run_with_database(create).id


def write_csv(history: Sequence[Mapping[str, float]], path: Path) -> None:
    steps: dict[int, dict[str, float]] = {}
    for entry in history:
        row = steps.setdefault(int(entry["step"]), {})
        row |= {column: entry[name] for column, names in CSV_COLUMNS.items() for name in names if name in entry}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", *CSV_COLUMNS])
        writer.writeheader()
        writer.writerows({"step": step, **row} for step, row in sorted(steps.items()) if row)
