"""The sweep of blobs: it deletes what no version uses, and nothing because the registry has lost its versions."""

import os
from datetime import timedelta

import pytest
from sqlalchemy import update

from cluster import storage
from cluster.db import Database, now
from cluster.ownership import LOCAL
from pipelines.training.models import blob_cleanup, blobs, deletion
from pipelines.training.models.blobs import Blob
from pipelines.training.models.versions import ModelDefaults, ModelFile
from tests.support.registry_model import RegistryModel

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


async def add_version(database: Database, registry_model: RegistryModel) -> ModelFile:
    """Make a version from a blob that nobody has touched for two days."""
    file, path = registry_model.file(os.urandom(1000))
    await blobs.add_file(database, path, file.sha256)
    await registry_model.registry.register_blobs(registry_model.name, [file], defaults=ModelDefaults())
    async with database.transaction() as session:
        await session.execute(update(Blob).values(used_at=now() - timedelta(days=2)))
    return file


def is_stored(file: ModelFile) -> bool:
    return storage.exists(storage.address(f"blobs/{file.sha256}"))


async def lose_the_model(registry_model: RegistryModel) -> None:
    """As if the registry was lost, or another one was named: it knows neither the versions nor the model."""
    call = registry_model.mlflow.call
    await call("DELETE", "registered-models/delete", json={"name": registry_model.name})


async def test_blobs_are_kept_when_the_registry_does_not_know_their_models(
    database: Database, registry_model: RegistryModel, caplog: pytest.LogCaptureFixture
) -> None:
    file = await add_version(database, registry_model)
    assert await blob_cleanup.sweep(database) == 0
    await lose_the_model(registry_model)
    assert await blob_cleanup.sweep(database) == 0
    assert is_stored(file)
    assert (
        f"1 blobs are kept, because MLflow does not know the models that were made of them: {registry_model.name}"
        in (caplog.text)
    )
    # A model of the same name, but another one.
    other = await add_version(database, registry_model)
    assert await blob_cleanup.sweep(database) == 0
    assert is_stored(file)
    assert is_stored(other)


async def test_blobs_of_versions_that_were_deleted_are_deleted(
    database: Database, registry_model: RegistryModel
) -> None:
    file = await add_version(database, registry_model)
    assert await blob_cleanup.sweep(database) == 0
    await deletion.remove(registry_model.name, LOCAL)
    assert await blob_cleanup.sweep(database) == 1
    assert not is_stored(file)


async def test_blobs_that_no_version_ever_used_are_deleted(database: Database, registry_model: RegistryModel) -> None:
    file, path = registry_model.file(os.urandom(1000))
    await blobs.add_file(database, path, file.sha256)
    assert await blob_cleanup.sweep(database) == 0
    async with database.transaction() as session:
        await session.execute(update(Blob).values(used_at=now() - timedelta(days=2)))
    assert await blob_cleanup.sweep(database) == 1
    assert not is_stored(file)
