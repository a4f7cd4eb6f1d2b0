"""The guarantees of the queue, on both databases. There is no worker process: the tests act as the worker."""

import asyncio
from contextlib import suppress
from datetime import timedelta

import pytest
from sqlalchemy import func, select, update

from cluster.db import Database, now
from cluster.errors import Forbidden
from cluster.ownership import LOCAL, Principal
from cluster.settings import get_settings
from jobs import journal, leases, queue, wait_reasons
from jobs.dispatch.capacity import actor_options, placed_elsewhere
from jobs.leases import LeadershipLost
from jobs.queue import IdempotencyConflict, JobNotFound, JobRequest, JobStateConflict, UnknownDependency
from jobs.registry import InvalidSpec, Resources, UnknownKind
from jobs.retry_policy import Failure
from jobs.states import State
from jobs.tables import Job, JobEvent
from tests.jobs.queue_harness import QueueHarness

pytestmark = pytest.mark.both_databases

ALICE = Principal(id="a" * 36, name="alice")
BOB = Principal(id="b" * 36, name="bob")


@pytest.fixture
async def harness(database: Database) -> QueueHarness:
    harness = QueueHarness(database)
    await harness.lead()
    return harness


async def test_a_job_goes_from_queued_to_succeeded(harness: QueueHarness) -> None:
    job = await harness.submit(spec={"payload": {"deep": [1, None]}})
    assert (job.state, job.attempt, job.progress) == (State.QUEUED, 0, 0.0)
    (claim,) = await harness.claim()
    assert (claim.job_id, claim.attempt, claim.spec["payload"]) == (job.id, 1, {"deep": [1, None]})
    assert await harness.write(claim, leases.succeeded_values({"answer": 42}), ("succeeded", {}))
    done = await harness.job(job.id)
    assert (done.state, done.result, done.progress, done.worker) == (State.SUCCEEDED, {"answer": 42}, 100.0, None)
    assert done.started_at is not None
    assert done.finished_at is not None
    async with harness.database.read_transaction() as session:
        assert [event.type for event in await journal.read(session, job.id)] == ["queued", "running", "succeeded"]


async def test_a_rolled_back_request_leaves_no_job(harness: QueueHarness) -> None:
    with suppress(ZeroDivisionError):
        async with harness.database.transaction() as session:
            await queue.enqueue(session, JobRequest(kind="probe"), LOCAL)
            _ = 1 / 0
    async with harness.database.read_transaction() as session:
        assert await session.scalar(select(func.count()).select_from(Job)) == 0
        assert await session.scalar(select(func.count()).select_from(JobEvent)) == 0


async def test_claims_are_ordered_by_priority_then_age(harness: QueueHarness) -> None:
    first, second = await harness.submit(), await harness.submit()
    urgent = await harness.submit(priority=5)
    later = await harness.submit(priority=9, run_after=now() + timedelta(hours=1))
    claims = await harness.claim()
    assert [claim.job_id for claim in claims] == [urgent.id, first.id, second.id]
    assert (await harness.job(later.id)).state == State.QUEUED


async def test_no_more_jobs_are_claimed_than_there_are_slots(harness: QueueHarness) -> None:
    for _ in range(11):
        await harness.submit()
    assert len(await harness.claim()) == 8
    assert await harness.claim() == []


async def test_a_spec_is_validated_before_it_is_queued(harness: QueueHarness) -> None:
    with pytest.raises(InvalidSpec, match="steps"):
        await harness.submit(spec={"steps": -1})
    with pytest.raises(InvalidSpec, match="colour"):
        await harness.submit(spec={"colour": "red"})
    with pytest.raises(UnknownKind, match=r"There are: .*probe, .*sweep"):
        await harness.submit(kind="prob")
    with pytest.raises(Forbidden):
        await harness.submit(ALICE, kind="sweep")
    with pytest.raises(Forbidden):
        async with harness.database.transaction() as session:
            await queue.enqueue_many(session, [JobRequest(kind="probe"), JobRequest(kind="sweep")], ALICE)
    async with harness.database.read_transaction() as session:
        assert await session.scalar(select(func.count()).select_from(Job)) == 0


async def test_a_repeated_idempotency_key_returns_the_same_job(harness: QueueHarness) -> None:
    first = await harness.submit(ALICE, "k", spec={"payload": 1})
    second = await harness.submit(ALICE, "k", spec={"payload": 1})
    assert second.id == first.id
    with pytest.raises(IdempotencyConflict):
        await harness.submit(ALICE, "k", spec={"payload": 2})
    assert (await harness.submit(BOB, "k", spec={"payload": 1})).id != first.id


async def test_concurrent_requests_with_one_idempotency_key_make_one_job(harness: QueueHarness) -> None:
    jobs = await asyncio.gather(*(harness.submit(ALICE, "k") for _ in range(12)))
    assert len({job.id for job in jobs}) == 1


async def test_a_job_is_visible_only_to_its_owner(harness: QueueHarness) -> None:
    job = await harness.submit(ALICE)
    async with harness.database.read_transaction() as session:
        assert (await queue.get(session, job.id, ALICE)).id == job.id
        with pytest.raises(JobNotFound):
            await queue.get(session, job.id, BOB)


async def test_writes_of_a_worker_whose_lease_expired_are_rejected(harness: QueueHarness) -> None:
    job = await harness.submit()
    (expired,) = await harness.claim()
    assert await harness.release_expired() == []
    harness.clock.seconds = get_settings().jobs.lease_seconds
    assert await harness.release_expired() == []
    harness.clock.seconds += 0.1
    assert await harness.release_expired() == [(job.id, "worker-1")]
    (replacement,) = await harness.claim()
    assert replacement.attempt == 1  # a lost worker does not count as an attempt
    assert not await harness.write(expired, leases.succeeded_values("from the grave"), ("succeeded", {}))
    assert await harness.write(replacement, leases.succeeded_values("alive"), ("succeeded", {}))
    assert not await harness.write(expired, leases.succeeded_values("from the grave"), ("succeeded", {}))
    assert (await harness.job(job.id)).result == "alive"
    async with harness.database.read_transaction() as session:
        types = [event.type for event in await journal.read(session, job.id)]
    assert types.count("succeeded") == 1


async def test_a_retryable_failure_is_retried_from_its_checkpoint(harness: QueueHarness) -> None:
    job = await harness.submit()
    (claim,) = await harness.claim()
    assert await harness.write(claim, {"checkpoint": {"step": 3}}, ("checkpoint", {}))
    values = leases.failure_values(Failure("flaky", "Try again.", 0.0), claim.attempt, claim.max_attempts)
    assert await harness.write(claim, values, ("queued", {}))
    (retry,) = await harness.claim()
    assert (retry.attempt, retry.checkpoint, retry.token != claim.token) == (2, {"step": 3}, True)
    assert await harness.write(retry, leases.failure_values(Failure("bad", "No use.", None), 2, 3), ("failed", {}))
    done = await harness.job(job.id)
    assert (done.state, done.error) == (State.FAILED, {"code": "bad", "message": "No use."})


async def test_a_job_waits_for_its_dependencies_and_fails_with_them(harness: QueueHarness) -> None:
    first = await harness.submit()
    second = await harness.submit(depends_on=[first.id])
    third = await harness.submit(depends_on=[second.id, first.id])
    (claim,) = await harness.claim()
    assert claim.job_id == first.id
    async with harness.database.read_transaction() as session:
        reasons = await wait_reasons.reasons(session, [await session.get_one(Job, job.id) for job in (second, third)])
    assert reasons[second.id] == f"{first.id} to succeed"
    await harness.write(claim, leases.succeeded_values(None), ("succeeded", {}))
    (claim,) = await harness.claim()
    assert claim.job_id == second.id
    await harness.write(claim, leases.failure_values(Failure("bad", "Broken."), 1, 1), ("failed", {}))
    dependent = await harness.job(third.id)
    assert (dependent.state, dependent.error) == (
        State.FAILED,
        {"code": "dependency_failed", "message": f"{second.id}, which this job depends on, failed."},
    )
    depends_on_failed = await harness.submit(depends_on=[second.id])
    assert (await harness.job(depends_on_failed.id)).state == State.FAILED
    depends_on_succeeded = await harness.submit(depends_on=[first.id])
    assert [claim.job_id for claim in await harness.claim()] == [depends_on_succeeded.id]
    with pytest.raises(UnknownDependency):
        await harness.submit(depends_on=["job_20200101_000000_none"])
    with pytest.raises(UnknownDependency):
        await harness.submit(BOB, depends_on=[first.id])


async def test_cancel_applies_to_children_and_dependents(harness: QueueHarness) -> None:
    parent = await harness.submit()
    (claim,) = await harness.claim()
    async with harness.database.transaction() as session:
        child = await queue.enqueue_child(session, parent, "part", "probe", {})
        same = await queue.enqueue_child(session, parent, "part", "probe", {})
    assert child.id == same.id
    dependent = await harness.submit(depends_on=[child.id])
    await harness.apply(queue.cancel, parent.id)
    assert (await harness.job(child.id)).state == State.CANCELLED
    assert (await harness.job(dependent.id)).state == State.FAILED
    running = await harness.job(parent.id)
    assert (running.state, running.control) == (State.RUNNING, "cancel")
    async with harness.database.transaction() as session:
        assert await leases.renew(session, [claim.token, "another"]) == {claim.token: "cancel"}
    assert await harness.write(claim, leases.cancelled_values(), ("cancelled", {}))
    with pytest.raises(JobStateConflict, match="been cancelled"):
        await harness.apply(queue.cancel, parent.id)


async def test_a_parked_parent_resumes_when_its_children_have_finished(harness: QueueHarness) -> None:
    parent = await harness.submit()
    (claim,) = await harness.claim()
    async with harness.database.transaction() as session:
        child = await queue.enqueue_child(session, parent, "part", "probe", {})
        assert await leases.park(session, parent.id, claim.token, [child.id])
    harness.capacity.release(claim.worker, parent.id)
    (of_child,) = await harness.claim()
    assert of_child.job_id == child.id
    await harness.write(of_child, leases.succeeded_values("part"), ("succeeded", {}))
    (resumed,) = await harness.claim()
    assert (resumed.job_id, resumed.attempt) == (parent.id, 1)
    async with harness.database.transaction() as session:
        failing = await queue.enqueue_child(session, parent, "black sheep", "probe", {})
        assert await leases.park(session, parent.id, resumed.token, [failing.id])
    harness.capacity.release(resumed.worker, parent.id)
    (of_failing,) = await harness.claim()
    await harness.write(of_failing, leases.failure_values(Failure("bad", "Broken."), 1, 1), ("failed", {}))
    error = {"code": "child_failed", "message": f"Its child 'black sheep' ({failing.id}) failed: Broken."}
    assert (await harness.job(parent.id)).error == error


async def test_pause_and_resume(harness: QueueHarness) -> None:
    job = await harness.submit()
    await harness.apply(queue.pause, job.id)
    assert await harness.claim() == []
    await harness.apply(queue.resume, job.id)
    (claim,) = await harness.claim()
    await harness.apply(queue.pause, job.id)
    assert (await harness.job(job.id)).control == "pause"
    await harness.write(claim, leases.paused_values(), ("paused", {}))
    paused = await harness.job(job.id)
    assert (paused.state, paused.control, paused.worker) == (State.PAUSED, None, None)
    await harness.apply(queue.resume, job.id)
    assert len(await harness.claim()) == 1
    with pytest.raises(JobStateConflict):
        await harness.apply(queue.resume, job.id)


async def test_a_pause_applies_to_all_descendants(harness: QueueHarness) -> None:
    parent = await harness.submit()
    (claim,) = await harness.claim()
    async with harness.database.transaction() as session:
        runs = await queue.enqueue_child(session, parent, "runs", "probe", {})
        assert await leases.park(session, parent.id, claim.token, [runs.id])
    harness.capacity.release(claim.worker, parent.id)
    (of_child,) = await harness.claim()
    async with harness.database.transaction() as session:
        waits = await queue.enqueue_child(session, runs, "waits", "probe", {})
        done = await queue.enqueue_child(session, runs, "done", "probe", {})
    (of_waits, of_done) = await harness.claim()
    assert await harness.write(of_done, leases.succeeded_values(1), ("succeeded", {}))
    await harness.write(of_waits, leases.failure_values(Failure("flaky", "Again.", 3600.0), 1, 3), ("queued", {}))

    await harness.apply(queue.pause, parent.id)
    family = [await harness.job(member.id) for member in (parent, runs, waits, done)]
    states = [State.PAUSED, State.RUNNING, State.PAUSED, State.SUCCEEDED]
    assert [(member.state, member.control) for member in family] == list(
        zip(states, [None, "pause", None, None], strict=True)
    )
    # A child that the running job adds before it pauses is paused from the start.
    async with harness.database.transaction() as session:
        late = await queue.enqueue_child(session, await session.get_one(Job, runs.id), "late", "probe", {})
    assert (await harness.job(late.id)).state == State.PAUSED
    await harness.write(of_child, leases.paused_values(), ("paused", {}))
    assert await harness.claim() == []
    await harness.apply(queue.pause, parent.id)  # a second pause changes nothing

    await harness.apply(queue.resume, parent.id)
    family = [await harness.job(member.id) for member in (parent, runs, waits, late)]
    assert [member.state for member in family] == [State.QUEUED] * 4
    assert {claim.job_id for claim in await harness.claim()} == {runs.id, late.id}  # the parent still waits for them
    with pytest.raises(JobStateConflict, match="queued, not paused"):
        await harness.apply(queue.resume, parent.id)


async def test_resume_withdraws_a_pause_that_has_not_taken_effect(harness: QueueHarness) -> None:
    parent = await harness.submit()
    (claim,) = await harness.claim()
    async with harness.database.transaction() as session:
        children = [await queue.enqueue_child(session, parent, name, "probe", {}) for name in ("one", "two")]
        assert await leases.park(session, parent.id, claim.token, [child.id for child in children])
    harness.capacity.release(claim.worker, parent.id)
    first, _ = await harness.claim()
    await harness.apply(queue.cancel, children[1].id)
    await harness.apply(queue.pause, parent.id)
    assert [(await harness.job(child.id)).control for child in children] == ["pause", "cancel"]
    await harness.apply(queue.resume, parent.id)
    assert [(await harness.job(child.id)).control for child in children] == [None, "cancel"]

    # A child may still finish while its parent is paused.
    await harness.apply(queue.pause, parent.id)
    assert await harness.write(first, leases.succeeded_values(1), ("succeeded", {}))
    await harness.apply(queue.cancel, parent.id)
    assert (await harness.job(parent.id)).state == State.CANCELLED
    with pytest.raises(JobStateConflict, match="has already been cancelled"):
        await harness.apply(queue.pause, parent.id)


async def test_a_control_set_while_a_worker_writes_its_result_is_not_lost(harness: QueueHarness) -> None:
    job = await harness.submit()
    (claim,) = await harness.claim()
    await harness.apply(queue.cancel, job.id)  # the worker fails before it reads the control
    assert await harness.write(claim, leases.failure_values(Failure("flaky", "Again.", 0.0), 1, 3), ("queued", {}))
    assert (await harness.job(job.id)).state == State.CANCELLED

    job = await harness.submit()
    (claim,) = await harness.claim()
    await harness.apply(queue.pause, job.id)
    await harness.apply(queue.resume, job.id)  # the worker is just about to pause
    assert await harness.write(claim, leases.paused_values(), ("paused", {}))
    assert (await harness.job(job.id)).state == State.QUEUED
    (resumed,) = await harness.claim()

    await harness.apply(queue.cancel, job.id)
    async with harness.database.transaction() as session:
        assert await leases.park(session, job.id, resumed.token, [])
    assert (await harness.job(job.id)).state == State.CANCELLED
    async with harness.database.read_transaction() as session:
        types = [event.type for event in await journal.read(session, job.id)]
    assert types[-1] == "cancelled"


async def test_retrying_a_parent_retries_its_children(harness: QueueHarness) -> None:
    parent = await harness.submit()
    (claim,) = await harness.claim()
    async with harness.database.transaction() as session:
        child = await queue.enqueue_child(session, parent, "part", "probe", {})
        assert await leases.park(session, parent.id, claim.token, [child.id])
    harness.capacity.release(claim.worker, parent.id)
    await harness.apply(queue.cancel, parent.id)
    await harness.apply(queue.retry, parent.id)
    (of_child,) = await harness.claim()
    assert of_child.job_id == child.id
    await harness.write(of_child, leases.succeeded_values("part"), ("succeeded", {}))
    assert [claim.job_id for claim in await harness.claim()] == [parent.id]


async def test_a_job_is_not_retried_before_what_it_depends_on(harness: QueueHarness) -> None:
    first = await harness.submit()
    second = await harness.submit(depends_on=[first.id])
    await harness.apply(queue.cancel, first.id)
    with pytest.raises(JobStateConflict, match=f"{first.id}, which was cancelled"):
        await harness.apply(queue.retry, second.id)
    await harness.apply(queue.retry, first.id)
    await harness.apply(queue.retry, second.id)
    (claim,) = await harness.claim()
    await harness.write(claim, leases.succeeded_values(None), ("succeeded", {}))
    assert [claim.job_id for claim in await harness.claim()] == [second.id]


async def test_a_kind_without_a_limit_runs_any_number_of_jobs(harness: QueueHarness) -> None:
    harness.capacity.update_cluster({"CPU": 2.0}, [{"NodeID": "node", "Resources": {"CPU": 2.0}, "Labels": {}}])
    light, heavy = await harness.submit(), await harness.submit(resources={"cpus": 1})
    assert {claim.job_id for claim in await harness.claim()} == {light.id, heavy.id}


async def test_a_delayed_job_is_claimed_at_its_time(harness: QueueHarness) -> None:
    job = await harness.submit(run_after=now() + timedelta(hours=10))
    assert await harness.claim() == []
    async with harness.database.transaction() as session:
        due, _ = await leases.next_wakeup(session)
        assert 35_000 < due <= 36_000
        await session.execute(update(Job).values(run_after=now()))
    assert [claim.job_id for claim in await harness.claim()] == [job.id]


async def test_retry_resets_the_attempts_and_keeps_the_checkpoint(harness: QueueHarness) -> None:
    job = await harness.submit()
    (claim,) = await harness.claim()
    await harness.write(claim, {"checkpoint": 7})
    await harness.write(claim, leases.failure_values(Failure("bad", "Broken."), 3, 3), ("failed", {}))
    await harness.apply(queue.retry, job.id)
    (retry,) = await harness.claim()
    assert (retry.attempt, retry.checkpoint) == (1, 7)
    with pytest.raises(JobStateConflict):
        await harness.apply(queue.retry, job.id)


async def test_only_one_dispatcher_leads(harness: QueueHarness) -> None:
    await harness.submit()
    old = harness.token
    assert await harness.lead("elsewhere") is None
    assert await harness.lead("here") is not None  # the same holder may take over at once
    async with harness.database.transaction() as session:
        with pytest.raises(LeadershipLost):
            await leases.claim_jobs(session, old, harness.capacity)
    assert len(await harness.claim()) == 1


async def test_a_kind_at_its_limit_does_not_block_other_kinds(harness: QueueHarness) -> None:
    sweeps = [await harness.submit(kind="sweep", priority=3) for _ in range(3)]
    probe = await harness.submit()
    assert {claim.job_id for claim in await harness.claim()} == {sweeps[0].id, probe.id}
    async with harness.database.read_transaction() as session:
        reasons = await wait_reasons.reasons(session, [await session.get_one(Job, sweeps[1].id)])
    assert reasons[sweeps[1].id] == "one of the 1 running 'sweep' jobs to finish"


async def test_no_job_gets_a_node_that_is_avoided(harness: QueueHarness) -> None:
    large, small = [{"NodeID": f"{size:g}", "Resources": {"CPU": size}, "Labels": {}} for size in (8.0, 1.0)]
    harness.capacity.avoided_nodes = {"8"}
    harness.capacity.update_cluster({"CPU": 9.0}, [large, small])
    await harness.submit(resources={"cpus": 2}, priority=9)
    fits = await harness.submit(resources={"cpus": 1})
    assert [claim.job_id for claim in await harness.claim()] == [fits.id]
    labelled = actor_options(Resources(cpus=1, labels={"zone": "a"}))
    placed = placed_elsewhere(labelled, {"8"})
    assert placed == {**labelled, "label_selector": {"zone": "a", "ray.io/node-id": "!in(8)"}}
    assert placed_elsewhere(labelled, ()) == labelled


async def test_a_job_too_large_for_the_cluster_has_a_wait_reason(harness: QueueHarness) -> None:
    harness.capacity.update_cluster(
        {"CPU": 2.0}, [{"NodeID": "node", "Resources": {"CPU": 2.0, "memory": 2**30}, "Labels": {"zone": "a"}}]
    )
    too_large = await harness.submit(resources={"gpus": 8}, priority=9)
    other_zone = await harness.submit(resources={"cpus": 1, "labels": {"zone": "b"}}, priority=9)
    fits = await harness.submit(resources={"cpus": 1, "labels": {"zone": "a"}})
    full = await harness.submit(resources={"cpus": 1.5})
    claims = await harness.claim()
    assert [claim.job_id for claim in claims] == [fits.id]
    async with harness.database.read_transaction() as session:
        jobs = [await session.get_one(Job, job.id) for job in (too_large, other_zone, full)]
        reasons = await wait_reasons.reasons(session, jobs)
    assert (
        reasons[too_large.id]
        == "8 GPU; the cluster has 2 CPU, 0 GPU, 1024 MB memory, 8 processes in all, and not enough of it free"
    )
    assert reasons[other_zone.id].startswith("1 CPU, zone=b")
    assert reasons[full.id].startswith("1.5 CPU")


async def test_heavy_jobs_have_a_bounded_number_of_processes(harness: QueueHarness) -> None:
    view = {"CPU": 2.0}, [{"NodeID": "node", "Resources": {"CPU": 2.0, "memory": 2.0**30}, "Labels": {}}]
    for _ in range(20):
        await harness.submit(resources={"cpus": 0.0001})
    gang = await harness.submit(resources={"cpus": 0.0001, "workers": 9}, priority=9)
    harness.capacity.update_cluster(*view)
    first = await harness.claim()
    assert len(first) == 4 * 2
    harness.capacity.mark_view_used()
    harness.capacity.update_cluster(*view)
    assert await harness.claim() == []
    async with harness.database.read_transaction() as session:
        reasons = await wait_reasons.reasons(session, [await session.get_one(Job, gang.id)])
    assert "8 processes in all, and not enough of it free" in reasons[gang.id]
    for claim in first:
        await harness.write(claim, leases.succeeded_values(None))
        harness.capacity.remove(claim.worker)
    assert len(await harness.claim()) == 4 * 2


async def test_many_jobs_are_queued_in_one_transaction(harness: QueueHarness) -> None:
    async with harness.database.transaction() as session:
        jobs = await queue.enqueue_many(session, [JobRequest(kind="probe") for _ in range(1000)], LOCAL)
    assert len({job.id for job in jobs}) == 1000
