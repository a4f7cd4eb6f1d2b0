"""API6, sensitive business flows: what an attacker wants to have served under a name that others trust."""

import asyncio
from pathlib import Path

import pytest

from cluster import identity
from cluster.db import now
from cluster.ownership import LOCAL, Principal, system
from cluster.settings import get_settings
from jobs.context import Context
from jobs.leases import Claim
from pipelines.training.deploy import job as deploy_job
from pipelines.training.deploy.job import VersionNotPassed, require_validated
from pipelines.training.models import names
from pipelines.training.models.versions import ModelNameTaken
from tests.support.api_client import LEARN, ApiClient
from tests.support.platform import unused_ports
from tests.support.recording_link import RecordingLink
from tests.support.registry_model import RegistryModel
from tests.support.run_jobs import run_queued

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

ADA = Principal(id="a" * 36, name="ada")
MALLORY = Principal(id="b" * 36, name="mallory")


@pytest.fixture(autouse=True)
def no_engine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_ENGINES__REPLICAS", "0")


@pytest.mark.usefixtures("database")
async def test_register_a_version_of_somebody_elses_model(registry_model: RegistryModel) -> None:
    first = await registry_model.register(principal=ADA)
    with pytest.raises(ModelNameTaken, match=f"'{registry_model.name}' belongs to another account"):
        await registry_model.register(principal=MALLORY)
    assert (await registry_model.registry.model(registry_model.name)).versions == [first]
    assert (await registry_model.register(principal=ADA)).number == 2
    assert (await registry_model.register(principal=system("guardian"))).number == 3
    # The name stays, and so does its owner.
    await registry_model.registry.delete_model(registry_model.name)
    with pytest.raises(ModelNameTaken):
        await registry_model.register(principal=MALLORY)


@pytest.mark.usefixtures("database")
async def test_register_a_version_of_an_administrators_model(registry_model: RegistryModel) -> None:
    await registry_model.register(principal=LOCAL)
    with pytest.raises(ModelNameTaken):
        await registry_model.register(principal=MALLORY)


@pytest.mark.usefixtures("database")
async def test_take_a_name_at_the_moment_it_is_made(registry_model: RegistryModel) -> None:
    both = (registry_model.register(principal=one) for one in (ADA, MALLORY))
    outcomes = await asyncio.gather(*both, return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["ModelNameTaken", "Version"]


async def test_be_told_of_a_taken_name_after_hours_of_training(api: ApiClient, registry_model: RegistryModel) -> None:
    """Each kind of job that leads to a version fails at its beginning."""
    await registry_model.register(principal=identity.principal(api.users["ada"]))
    result = {"name": registry_model.name, "base_model": "forgearr/tiny"}
    training = await api.queue_training("bob", result=result, finished_at=now())
    await api.queue_job("fine_tune", {**LEARN, "name": registry_model.name}, "bob")
    await api.queue_job("export", {"job_id": training}, "bob")
    for kind in ("fine_tune", "export"):
        with pytest.raises(ModelNameTaken):
            await run_queued(api.database, kind)


async def test_a_training_needs_no_registry(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = unused_ports(1)
    monkeypatch.setenv("FORGEARR_MLFLOW__TRACKING_URI", f"http://127.0.0.1:{port}")
    get_settings.cache_clear()
    link = RecordingLink()
    claim = Claim("job_1", "t", "fine_tune", {}, None, 1, 3, None, None, {}, "w", api.users["ada"].id)
    await asyncio.to_thread(names.check_early, Context(claim, link), "house")
    assert link.logged[0].startswith("Whether the name 'house' is free is not known yet: ")


@pytest.mark.usefixtures("database")
async def test_pass_by_gates_of_its_own(registry_model: RegistryModel) -> None:
    """A verdict says what it was reached with, and a deployment judges again by the gates of the settings."""
    await registry_model.register()
    await registry_model.pass_validation(1, perplexity_ratio=30.0, gguf_kl=9.0)
    version = await registry_model.registry.find(f"{registry_model.name}:v1")
    with pytest.raises(VersionNotPassed) as refusal:
        require_validated(version, force=False)
    assert refusal.value.message == (
        f"{version.reference} is not deployed: it passed its validation with other gates, but by those that count now "
        "it fails: perplexity_ratio is 30, and max_perplexity_ratio is 1; gguf_kl is 9, and max_kl is 0.2. Use force "
        "to deploy it anyway."
    )
    require_validated(version, force=True)
    # An administrator may choose gates for the whole way from training to deployment.
    require_validated(version, force=False, gates={"max_perplexity_ratio": None, "max_kl": 10})


@pytest.mark.usefixtures("database")
async def test_pass_without_measurements(registry_model: RegistryModel) -> None:
    await registry_model.register()
    await registry_model.registry.set_validation(registry_model.name, 1, True)
    version = await registry_model.registry.find(f"{registry_model.name}:v1")
    with pytest.raises(VersionNotPassed, match=r"gguf_kl was not measured, and max_kl is 0\.2"):
        require_validated(version, force=False)


@pytest.mark.usefixtures("database")
async def test_pass_on_a_single_sample(registry_model: RegistryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    await registry_model.register()
    await registry_model.pass_validation(1, samples=1)
    version = await registry_model.registry.find(f"{registry_model.name}:v1")
    require_validated(version, force=False)
    monkeypatch.setenv("FORGEARR_GATES__MIN_SAMPLES", "10")
    get_settings.cache_clear()
    with pytest.raises(VersionNotPassed, match="samples is 1, and min_samples is 10"):
        require_validated(version, force=False)


async def test_be_deployed_through_the_route(api: ApiClient, registry_model: RegistryModel) -> None:
    await registry_model.register()
    await registry_model.pass_validation(1, perplexity_ratio=30.0)
    path = f"/api/v1/models/{registry_model.name}"
    refused = await api.request("admin", "POST", f"{path}/deploy", json={"version": 1})
    assert (refused.status_code, refused.json()["error_code"]) == (409, "VERSION_NOT_PASSED")
    shown = (await api.request("admin", "GET", path)).json()["versions"][0]
    assert (shown["passed"], shown["validation"]["metrics"]["perplexity_ratio"]) == (True, 30.0)
    assert shown["validation"]["metrics"]["samples"] == 20


@pytest.mark.usefixtures("database")
async def test_a_rollback_says_that_its_version_would_not_pass(registry_model: RegistryModel) -> None:
    for number, ratio in ((1, 30.0), (2, 0.5)):
        await registry_model.register()
        await registry_model.pass_validation(number, perplexity_ratio=ratio)
        await registry_model.registry.set_served(registry_model.name, number)
    version, _, warning = await deploy_job.roll_back(registry_model.name)
    assert version.number == 1
    assert warning is not None
    assert "v1 is served, but it passed its validation with other gates" in warning
