"""Lost workers: a job that kills its workers is stopped, and no other job is blamed for it. On both databases."""

import pytest

from cluster.db import Database
from cluster.settings import get_settings
from jobs import leases
from jobs.leases import OWN_WORKER, Claim
from jobs.states import State
from tests.jobs.queue_harness import ONE_CPU, QueueHarness

pytestmark = pytest.mark.both_databases


@pytest.fixture
async def harness(database: Database) -> QueueHarness:
    harness = QueueHarness(database)
    await harness.lead()
    harness.capacity.update_cluster({"CPU": 1.0}, [ONE_CPU])
    return harness


async def claim_on_new_view(harness: QueueHarness) -> list[Claim]:
    harness.capacity.update_cluster({"CPU": 1.0}, [ONE_CPU])
    return await harness.claim()


async def test_a_job_that_kills_its_workers_is_stopped_and_its_neighbours_finish(harness: QueueHarness) -> None:
    deadly, neighbour = await harness.submit(priority=9), await harness.submit()
    limit = get_settings().jobs.max_losses
    shared: list[str] = []
    for step in range(2 * limit):
        for claim in await claim_on_new_view(harness):
            if claim.job_id == neighbour.id:
                assert await harness.write(claim, {"checkpoint": step})
            else:
                shared.append(claim.worker)
        await harness.lose_worker(shared[-1])
    assert shared[:limit] == ["worker-1"] * limit
    assert all(worker.startswith("heavy-") for worker in shared[limit:])
    failed = await harness.job(deadly.id)
    assert failed.state == State.FAILED
    assert failed.error == {
        "code": "worker_lost",
        "message": f"Its worker was lost {limit} times in a row, with no other job on it, and without a new "
        "checkpoint.",
    }
    running = await harness.job(neighbour.id)
    assert (running.state, running.losses, running.demand) == (State.RUNNING, 0, "")


@pytest.mark.parametrize("resources", [{}, {"cpus": 1}])
async def test_a_job_that_gets_further_each_time_is_not_blamed(
    harness: QueueHarness, resources: dict[str, float]
) -> None:
    job = await harness.submit(resources=resources)
    for step in range(20):
        (claim,) = await claim_on_new_view(harness)
        assert claim.checkpoint == (step - 1 if step else None)
        assert await harness.write(claim, {"checkpoint": step})
        await harness.lose_worker(claim.worker)
    (claim,) = await claim_on_new_view(harness)
    assert await harness.write(claim, leases.succeeded_values("done"), ("succeeded", {}))
    assert ((await harness.job(job.id)).losses, claim.attempt) == (0, 1)


async def test_a_job_that_saves_the_same_checkpoint_each_time_has_got_no_further(harness: QueueHarness) -> None:
    job = await harness.submit(resources={"cpus": 1})
    for _ in range(get_settings().jobs.max_losses + 1):
        (claim,) = await claim_on_new_view(harness)
        assert await harness.write(claim, {"checkpoint": {"dataset": "d1", "step": 0}})
        await harness.lose_worker(claim.worker)
    assert (await harness.job(job.id)).state == State.FAILED


async def test_losses_of_shared_workers_alone_do_not_fail_a_job(harness: QueueHarness) -> None:
    jobs = [await harness.submit() for _ in range(5)]
    for _ in range(get_settings().jobs.max_losses):
        assert {claim.worker for claim in await harness.claim()} == {"worker-1"}
        await harness.lose_worker("worker-1")
    suspects = [await harness.job(job.id) for job in jobs]
    assert {(job.state, job.demand, job.losses) for job in suspects} == {(State.QUEUED, OWN_WORKER, 0)}


async def test_a_suspect_that_gets_further_shares_a_worker_again(harness: QueueHarness) -> None:
    job = await harness.submit()
    for _ in range(get_settings().jobs.max_losses):
        await harness.claim()
        await harness.lose_worker("worker-1")
    (alone,) = await claim_on_new_view(harness)
    assert alone.worker.startswith("heavy-")
    assert await harness.write(alone, {"checkpoint": 1})
    await harness.lose_worker(alone.worker)
    (claim,) = await harness.claim()
    assert (claim.worker, (await harness.job(job.id)).losses) == ("worker-1", 0)


async def test_a_loss_that_no_job_can_have_caused_is_not_counted(harness: QueueHarness) -> None:
    """The worker's process had not started yet, or everything was stopped at once."""
    job = await harness.submit()
    for _ in range(10):
        (claim,) = await harness.claim()
        async with harness.database.transaction() as session:
            await leases.release_lost_jobs(session, claim.worker, count_loss=False)
        harness.capacity.release(claim.worker, job.id)
    lost = await harness.job(job.id)
    assert (lost.state, lost.losses, lost.demand) == (State.QUEUED, 0, "")
