"""The client of MLflow's REST API, on a real server."""

import logging
from uuid import uuid4

import pytest

from cluster import mlflow_client
from cluster.db import now


async def test_an_experiment_that_was_deleted_in_mlflow_is_restored(
    mlflow_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"export-{uuid4().hex[:8]}"
    async with mlflow_client.connect(mlflow_server) as mlflow:
        experiment = await mlflow.find_or_create_experiment(name)
        first = await mlflow.find_or_create_run(experiment, "job_1", now(), {})
        await mlflow.call("POST", "experiments/delete", json={"experiment_id": experiment})
        # The same client, as that of the dispatcher, and with it the next job.
        with caplog.at_level(logging.WARNING):
            assert await mlflow.find_or_create_experiment(name) == experiment
        second = await mlflow.find_or_create_run(experiment, "job_2", now(), {})
        assert first != second
        await mlflow.set_tags(second, {"forgearr.state": "running"})
    assert f"the experiment '{name}' was deleted in MLflow, and is restored" in caplog.text
