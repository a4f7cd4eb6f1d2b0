"""Checkpoints of trainings: whichever step of saving one is the last, there is a whole one to continue from."""

import asyncio
import itertools
import multiprocessing
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem
from sqlalchemy import select, update

from cluster import storage
from cluster.db import Database, now
from jobs.context import Context, StopJob
from jobs.execution import files
from jobs.leases import Claim
from jobs.states import State
from jobs.tables import Job
from pipelines.training.fine_tune import checkpoints
from pipelines.training.fine_tune.checkpoints import CheckpointsDamaged
from pipelines.training.fine_tune.job import JobObserver
from tests.support.recording_link import GuardedLink, RecordingLink, with_own_database
from tests.support.storage.unreliable_disk import PowerCut, use_unreliable_disk
from tests.support.waiting import eventually_async

JOB = "job_x"
FILES = ("model.safetensors", "optimizer.pt", "trainer_state.json")
MIN_OPERATIONS = 20
"""Saving a checkpoint of three files has at least this many operations that can fail."""


class OneProcess:
    """Ray Train's context in a training with one process."""

    def get_world_rank(self) -> int:
        return 0

    def get_world_size(self) -> int:
        return 1


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.train.get_context", OneProcess)


class Attempt:
    """One attempt at the training: it continues from the state that was recorded last."""

    def __init__(self, token: str, link: RecordingLink, folder: Path, state: dict[str, Any] | None = None) -> None:
        recorded = state if state is not None else (link.checkpoints[-1] if link.checkpoints else {})
        claim = Claim(JOB, token, "fine_tune", {}, recorded, 1, 3, None, None, {}, "w", None)
        self.context = Context(claim, link)
        self.state: dict[str, Any] = dict(recorded)
        self.folder = folder / token
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoints.require_whole(self.context, self.state)
        self.observer = JobObserver(self.context, self.state, self.folder, keep_epochs=2)

    def save(self, step: int, **training_state: Any) -> None:
        self.observer.save_checkpoint(self.write(step), {"step": step, **training_state})

    def write(self, step: int) -> Path:
        """Write the trainer's checkpoint of a step, which tells which attempt has written it."""
        checkpoint = self.folder / f"checkpoint-{step}"
        shutil.rmtree(checkpoint, ignore_errors=True)
        checkpoint.mkdir()
        for name in FILES:
            (checkpoint / name).write_text(f"{name} of step {step}, by {self.folder.name}. " * 100)
        return checkpoint

    def loaded(self) -> dict[str, str]:
        """The checkpoint from which the training continues."""
        checkpoint = self.observer.latest_checkpoint()
        assert checkpoint is not None
        return {path.name: path.read_text() for path in checkpoint.iterdir()}


def content(step: int, token: str) -> dict[str, str]:
    return {name: f"{name} of step {step}, by {token}. " * 100 for name in FILES}


@pytest.mark.parametrize("failure", ["the power is cut", "all processes are killed", "the disk fails once"])
def test_a_training_resumes_from_a_whole_checkpoint_whichever_operation_fails(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    resumed_from: list[int] = []
    for number in itertools.count(1):
        disk = use_unreliable_disk(tmp_path / f"disk-{number}", monkeypatch)
        link, work = RecordingLink(), tmp_path / f"work-{number}"
        attempt = Attempt("first", link, work)
        for step in (1, 2):
            attempt.save(step)
        disk.fail_at(number, cut_power=failure != "the disk fails once")
        try:
            attempt.save(3)
        except (PowerCut, OSError):
            disk.restart(lose_unsynced=failure == "the power is cut")
        else:
            break
        resumed = Attempt("second", link, work)
        step = link.checkpoints[-1]["place"]["step"]
        assert resumed.loaded() == content(step, "first")
        assert link.logged == []  # no checkpoint that was recorded is damaged
        resumed_from.append(step)
        resumed.save(step + 1)
        assert Attempt("third", link, work).loaded() == content(step + 1, "second")
    assert len(resumed_from) >= MIN_OPERATIONS
    assert set(resumed_from) == {2, 3}
    assert resumed_from == sorted(resumed_from)


@pytest.mark.usefixtures("bucket")
def test_a_training_resumes_from_a_bucket_whichever_request_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed_from: list[int] = []
    for number in itertools.count(1):
        link, work = RecordingLink(), tmp_path / f"work-{number}"
        attempt = Attempt("first", link, work)
        for step in (1, 2):
            attempt.save(step)
        try:
            with cut_line(number):
                attempt.save(3)
        except OSError:
            step = link.checkpoints[-1]["place"]["step"]
        else:
            break
        resumed = Attempt("second", link, work)
        assert resumed.loaded() == content(step, "first")
        assert link.logged == []
        resumed_from.append(step)
        resumed.save(step + 1)
        assert Attempt("third", link, work).loaded() == content(step + 1, "second")
        storage.remove(storage.address("jobs"))
    assert len(resumed_from) >= len(FILES)
    assert set(resumed_from) == {2, 3}
    assert resumed_from == sorted(resumed_from)


@contextmanager
def cut_line(number: int) -> Generator[None]:
    """This request to S3 fails, and all later ones."""
    requests = itertools.count(1)
    call = S3FileSystem._call_s3  # pyright: ignore[reportPrivateUsage]

    async def fail(self: Any, *arguments: Any, **options: Any) -> Any:
        if next(requests) >= number:
            raise OSError("the line is cut")
        return await call(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3FileSystem, "_call_s3", fail)
        yield


def truncate(checkpoint: Path) -> None:
    file = checkpoint / FILES[0]
    file.write_bytes(file.read_bytes()[:100])


def change(checkpoint: Path) -> None:
    file = checkpoint / FILES[1]
    file.write_bytes(bytes(file.stat().st_size))


def delete_a_file(checkpoint: Path) -> None:
    (checkpoint / FILES[2]).unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "model.safetensors has 100 bytes instead of "),
        (change, "optimizer.pt has changed since it was saved"),
        (delete_a_file, "trainer_state.json is missing"),
        (shutil.rmtree, "its folder is missing"),
    ],
)
def test_a_damaged_checkpoint_is_replaced_by_the_one_before(
    home: Path, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    link = RecordingLink()
    attempt = Attempt("first", link, tmp_path)
    for step in (3, 6, 9):
        attempt.save(step, batch_size=2, gradient_accumulation=8 if step == 9 else 4)
    damage(Path(link.checkpoints[-1]["checkpoints"]["9"]))

    resumed = Attempt("second", link, tmp_path)
    (message,) = link.logged
    assert message.startswith(f"The checkpoint of step 9 is damaged: {reason}")
    assert message.endswith("The training continues from step 6.")
    assert resumed.loaded() == content(6, "first")
    # The batches that fit into memory are kept.
    assert resumed.state["place"] == {"step": 6, "batch_size": 2, "gradient_accumulation": 8}
    resumed.save(9)
    assert Attempt("third", link, tmp_path).loaded() == content(9, "second")
    assert set(link.checkpoints[-1]["checkpoints"]) == {"6", "9"}
    assert len(link.logged) == 1


def test_a_training_without_a_whole_checkpoint_fails_and_says_why(home: Path, tmp_path: Path) -> None:
    link = RecordingLink()
    attempt = Attempt("first", link, tmp_path)
    for step in (3, 6):
        attempt.save(step)
    for step, damage in (("3", shutil.rmtree), ("6", truncate)):
        damage(Path(link.checkpoints[-1]["checkpoints"][step]))
    with pytest.raises(
        CheckpointsDamaged, match=r"of step 6, model.safetensors has 100 bytes .* of step 3, its folder"
    ):
        Attempt("second", link, tmp_path)
    assert link.logged == []


@pytest.mark.usefixtures("any_storage")
def test_the_newest_two_checkpoints_and_their_best_ones_are_kept(home: Path, tmp_path: Path) -> None:
    link = RecordingLink()
    attempt = Attempt("first", link, tmp_path)
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3), (5, 3)):
        attempt.save(step, best_step=best)
        kept = {str(number) for number in (step, step - 1, best, 1 if step == 3 else best) if number}
        assert set(link.checkpoints[-1]["checkpoints"]) == set(link.checkpoints[-1]["manifests"]) == kept
        assert stored_folders("checkpoints") == set(link.checkpoints[-1]["checkpoints"].values())


def test_a_step_that_is_saved_twice_leaves_the_recorded_checkpoint_alone(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = use_unreliable_disk(tmp_path / "disk", monkeypatch)
    link = RecordingLink()
    attempt = Attempt("first", link, tmp_path / "work")
    attempt.save(1)
    disk.fail_at(5, cut_power=True)
    with pytest.raises(PowerCut):
        attempt.save(1)
    disk.restart(lose_unsynced=True)
    assert Attempt("second", link, tmp_path / "work").loaded() == content(1, "first")
    assert link.logged == []


@pytest.mark.usefixtures("any_storage")
def test_a_checkpoint_of_an_earlier_version_is_resumed_and_then_replaced(home: Path, tmp_path: Path) -> None:
    """It has a name with the attempt and the step, and no manifest."""
    link = RecordingLink()
    source = Attempt("first", link, tmp_path).write(4)
    address = storage.save(source, f"jobs/{JOB}/checkpoints/1-4")
    state = {"dataset": "ds_1", "place": {"step": 4, "batch_size": 8}, "checkpoints": {"4": address}}
    resumed = Attempt("second", link, tmp_path, state)
    assert resumed.loaded() == content(4, "first")
    assert resumed.state == state
    resumed.save(5)
    assert set(link.checkpoints[-1]["checkpoints"]) == {"4", "5"}
    resumed.save(6)
    assert Attempt("third", link, tmp_path).loaded() == content(6, "second")
    assert not storage.exists(address)


@pytest.mark.usefixtures("any_storage")
async def test_a_worker_that_was_given_up_changes_nothing_of_its_successors(database: Database, tmp_path: Path) -> None:
    await add_job(database, "first")
    link = GuardedLink()
    given_up = Attempt("first", link, tmp_path)
    await in_thread(given_up.save, 1)
    await give_to(database, "second")
    successor = Attempt("second", link, tmp_path, await recorded(database))
    successor.observer.on_epoch(successor.write(2), {"step": 2})
    await in_thread(successor.save, 2)
    report = write_report(successor)
    # The first one was only frozen. It comes to the same step, and finds out afterwards.
    given_up.observer.on_epoch(given_up.write(2), {"step": 2})
    with pytest.raises(StopJob, match="lease_lost"):
        await in_thread(given_up.save, 2)
    write_report(given_up)

    state = await recorded(database)
    assert Attempt("third", link, tmp_path, state).loaded() == content(2, "second")
    assert link.logged == ["Checkpoint created at step 2", "Checkpoint created at step 2"]
    (epoch,) = state["epochs"]
    assert storage.read(f"{epoch['address']}/{FILES[0]}").decode() == content(2, "second")[FILES[0]]
    assert storage.read(report) == b"by second"


async def test_what_a_worker_that_was_given_up_has_left_is_deleted(database: Database, tmp_path: Path) -> None:
    await add_job(database, "first")
    link = GuardedLink()
    given_up = Attempt("first", link, tmp_path)
    await in_thread(given_up.save, 1)
    await give_to(database, "second")
    successor = Attempt("second", link, tmp_path, await recorded(database))
    with pytest.raises(StopJob):
        await in_thread(given_up.save, 2)
    # The successor has stored the next checkpoint, and not recorded it yet.
    unrecorded = storage.save(successor.write(3), successor.context.storage_name("checkpoints/3-1"))
    await files.remove_unrecorded(database, JOB)
    kept = set((await recorded(database))["checkpoints"].values())
    assert stored_folders("checkpoints") == kept | {unrecorded}
    assert (await recorded(database))["place"]["step"] == 1


async def test_a_training_survives_being_killed_at_any_moment(database: Database, tmp_path: Path) -> None:
    """Processes are killed while they save one checkpoint after the other. Each continues from a whole one."""
    await add_job(database, "lease")
    fork = multiprocessing.get_context("fork")
    messages = tmp_path / "messages"
    messages.touch()
    for round_number in range(8):
        reached = last_step(messages)
        process = fork.Process(target=save_until_killed, args=(tmp_path, messages, round_number))
        process.start()
        await eventually_async(lambda reached=reached: last_step(messages) > reached + 3)
        process.kill()
        process.join()
    assert (await recorded(database))["place"]["step"] >= last_step(messages)


def save_until_killed(folder: Path, messages: Path, round_number: int) -> None:
    """Continue the training, and write each step that was recorded, or what is wrong, to a file."""
    link = GuardedLink()
    with messages.open("a") as output:
        try:
            state = asyncio.run(with_own_database(recorded))
            attempt = Attempt("lease", link, folder / str(round_number), state)
            step = state.get("place", {}).get("step", 0)
            if step and attempt.loaded() != content(step, "lease"):
                print(f"the checkpoint of step {step} is not whole", file=output, flush=True)
            for number in itertools.count(step + 1):
                attempt.save(number)
                print(*link.logged or [number], file=output, flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=output, flush=True)


def last_step(messages: Path) -> int:
    lines = messages.read_text().splitlines()
    assert all(line.isdigit() for line in lines), lines
    return int(lines[-1]) if lines else 0


async def add_job(database: Database, token: str) -> None:
    job = Job(id=JOB, kind="fine_tune", spec={}, state=State.RUNNING, worker="w", lease_token=token, max_attempts=3)
    job.created_by, job.run_after, job.resources, job.demand = "test", now(), {}, ""
    async with database.transaction() as session:
        session.add(job)


async def give_to(database: Database, token: str) -> None:
    """Give the job to another worker, as after the loss of the first one."""
    async with database.transaction() as session:
        await session.execute(update(Job).values(lease_token=token))


async def recorded(database: Database) -> dict[str, Any]:
    async with database.read_transaction() as session:
        return await session.scalar(select(Job.checkpoint)) or {}


async def in_thread(function: Callable[..., None], *arguments: Any) -> None:
    """As a worker runs it: checkpoints wait for the event loop."""
    await asyncio.to_thread(function, *arguments)


def write_report(attempt: Attempt) -> str:
    report = attempt.folder / "report.md"
    report.write_text(f"by {attempt.folder.name}")
    return attempt.context.artifact(report)


def stored_folders(kind: str) -> set[str]:
    return {address.rpartition("/")[0] for address in storage.find(f"jobs/{JOB}") if f"/{kind}/" in address}
