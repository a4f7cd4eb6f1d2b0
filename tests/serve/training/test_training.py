"""The doors to trainings, without anybody who trains: what they answer, refuse and queue. The jobs stay where the test
puts them, because nothing here works on the queue."""

import asyncio
from collections import Counter
from typing import Any

import pytest

from cluster.db import Database
from cluster.ownership import LOCAL, Principal
from jobs import queue
from jobs.states import State
from pipelines.training import workers as training_workers
from pipelines.training.workers import TrainingWorker, WorkerNotFound
from serve.realtime.hub import Hub
from serve.training.sessions import training_status
from tests.support.api_client import LEARN, SESSION, SESSIONS, House
from tests.support.waiting import eventually_async

# Sessions


async def test_a_session_is_made_shown_changed_and_deleted(house: House) -> None:
    made = await house.ask("ada", "POST", SESSIONS, json=SESSION)
    assert made.status_code == 201
    session = made.json()
    assert session.items() >= {**SESSION, "base_model": "forgearr/tiny", "created_by": "ada"}.items()
    unknown = {"status", "description", "worker_id", "prompt_ids", "job_id"}
    assert {name for name, value in session.items() if value is None} == unknown
    path = f"{SESSIONS}/{session['id']}"
    assert (await house.ask("ada", "GET", path)).json() == session

    changed = await house.ask("ada", "PUT", path, json={"name": "House v2", "description": "Again.", "config": {}})
    assert changed.json().items() >= {"name": "House v2", "description": "Again.", "config": {}}.items()
    refused = await house.ask("ada", "PUT", path, json={"name": "House v3", "config": {"rank": 0}})
    assert refused.status_code == 422
    assert (await house.ask("ada", "GET", path)).json()["name"] == "House v2"

    assert (await house.ask("ada", "DELETE", path)).status_code == 204
    for method in ("GET", "DELETE"):
        answer = await house.ask("ada", method, path)
        assert (answer.status_code, answer.json()["error_code"]) == (404, "TRAINING_SESSION_NOT_FOUND")
    assert await house.kinds() == {}


async def test_sessions_come_in_pages_with_the_newest_first(house: House) -> None:
    made = [await house.session(name=f"Number {number}") for number in range(5)]
    assert (await house.start(made[1])).status_code == 200
    seen: list[str] = []
    path: str | None = f"{SESSIONS}?limit=2"
    while path:
        page = (await house.ask("ada", "GET", path)).json()
        assert page["total"] == 5
        seen += [one["id"] for one in page["items"]]
        path = page["links"]["next"]
    assert seen == made[::-1]
    everything = (await house.ask("ada", "GET", SESSIONS)).json()["items"]
    assert {one["id"]: one["status"] for one in everything} == {**dict.fromkeys(made), made[1]: "queued"}
    assert (await house.ask("ada", "GET", f"{SESSIONS}?skip=5")).json()["items"] == []
    for query in ("limit=0", "limit=101", "skip=-1", "skip=9999999999", "limit=x"):
        assert (await house.ask("ada", "GET", f"{SESSIONS}?{query}")).status_code == 422


async def test_a_user_sees_only_their_own_sessions_and_an_administrator_all(house: House) -> None:
    session = await house.session("ada")
    for who, count in (("ada", 1), ("bob", 0), ("admin", 1)):
        assert (await house.ask(who, "GET", SESSIONS)).json()["total"] == count
    path = f"{SESSIONS}/{session}"
    for method, address, body in (
        ("GET", path, None),
        ("PUT", path, SESSION),
        ("DELETE", path, None),
        ("GET", f"{path}/status", None),
        ("POST", f"{path}/cancel", None),
        ("POST", f"{path}/start", LEARN),
        ("POST", f"{path}/start", {**LEARN, "worker_id": 1}),
    ):
        answer = await house.ask("bob", method, address, json=body)
        assert (answer.status_code, answer.json()["error_code"]) == (404, "TRAINING_SESSION_NOT_FOUND")
    assert (await house.ask("admin", "GET", f"{path}/status")).json()["status"] is None
    assert await house.kinds() == {}


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"config": {"learning_rate": -1}}, "config.learning_rate"),
        ({"config": {"num_epochs": 0}}, "config.num_epochs"),
        ({"config": {"num_epochs": "3"}}, "config.num_epochs"),
        ({"config": {"num_epochs": True}}, "config.num_epochs"),
        ({"config": {"num_epochs": None}}, "config.num_epochs"),
        ({"config": {"epochs": 1e300}}, "config.epochs"),
        ({"config": {"epochs": 1, "num_epochs": 1}}, "config.epochs"),
        ({"config": {"rank": "16"}}, "config.rank"),
        ({"config": {"rank": 1.5}}, "config.rank"),
        ({"config": {"batch_size": "many"}}, "config.batch_size"),
        ({"config": {"batch_size": 0}}, "config"),
        ({"config": {"target_modules": [1]}}, "config.target_modules"),
        ({"config": {"tags": {"a": 1}}}, "config.tags"),
        ({"config": {"pissa": True, "tuning": "full"}}, "config"),
        ({"config": {"lerning_rate": 1}}, "config.lerning_rate"),
        ({"config": {"__proto__": {}}}, "config.__proto__"),
        ({"config": {"'; DROP TABLE jobs; --": 1}}, "config.'; DROP TABLE jobs; --"),
        ({"config": {"name": "other"}}, "config.name"),
        ({"config": {"data": {"folder": "/etc"}}}, "config.data"),
        ({"config": {"base_model": "/etc"}}, "config.base_model"),
        ({"config": {"labels": {}}}, "config.labels"),
        ({"config": {str(number): number for number in range(101)}}, "config"),
        ({"config": []}, "config"),
        ({"config": None}, "config"),
        ({"name": ""}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"name": 1}, "name"),
        ({"description": "x" * 10_001}, "description"),
        ({"base_model": ""}, "base_model"),
        ({"base_model": ["a"]}, "base_model"),
        ({"job_id": "job_1"}, "job_id"),
        ({"owner_id": None}, "owner_id"),
    ],
)
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_what_is_wrong_with_a_session_is_named(house: House, said: dict[str, Any], field: str) -> None:
    answer = await house.ask("ada", "POST", SESSIONS, json={**SESSION, **said})
    assert answer.status_code == 422, answer.text
    assert list(answer.json()["details"]) == [field]
    assert field in answer.json()["message"]
    assert (await house.ask("ada", "GET", SESSIONS)).json()["total"] == 0


async def test_a_config_that_no_job_could_have_is_refused(house: House) -> None:
    for config in ({"cpus_per_worker": 1e-9}, {"gpus_per_worker": 1e-9}, {"tags": {"note": "x" * 1_000_000}}):
        answer = await house.ask("ada", "POST", SESSIONS, json={**SESSION, "config": config})
        assert (answer.status_code, answer.json()["error_code"]) == (422, "INVALID_JOB_SPEC")
    assert (await house.ask("ada", "GET", SESSIONS)).json()["total"] == 0


async def test_odd_names_come_back_as_they_were_and_make_sound_names_of_models(house: House) -> None:
    for name, model in (
        ("Custom Assistant v1", "custom-assistant-v1"),
        ("'; DROP TABLE training_sessions; --", "drop-table-training_sessions"),
        ("../../etc/passwd", "etc-passwd"),
        ("<script>alert(1)</script>", "script-alert-1-script"),
        ("größer 🏠", "gr-er"),
        ("🏠" * 200, "session"),
        ("%s %(name)s {name}", "s-name-s-name"),
        ("x" * 200, "x" * 99),
    ):
        session = await house.session(name=name)
        assert (await house.ask("ada", "GET", f"{SESSIONS}/{session}")).json()["name"] == name
        started = (await house.start(session)).json()
        assert (await house.job(started["job_id"]))["spec"]["name"] == model


async def test_an_odd_id_is_that_of_no_session(house: House) -> None:
    for odd in ("'%20OR%20'1'='1", "%F0%9F%8F%A0", "-1", "00000000-0000-0000-0000-000000000000"):
        for method, last in (("GET", ""), ("GET", "/status"), ("POST", "/cancel"), ("DELETE", "")):
            assert (await house.ask("admin", method, f"{SESSIONS}/{odd}{last}")).status_code == 404
    assert (await house.ask("admin", "GET", f"{SESSIONS}/{'x' * 41}")).status_code == 422
    assert (await house.ask("admin", "GET", f"{SESSIONS}/%00")).status_code == 400


# Starting


@pytest.mark.parametrize(
    ("said", "status", "code"),
    [
        ({"worker_id": None}, 400, "INVALID_REQUEST"),
        ({"prompt_ids": None, "data": None}, 400, "INVALID_REQUEST"),
        ({"prompt_ids": [1], **LEARN}, 400, "INVALID_REQUEST"),
        ({"prompt_ids": []}, 422, "VALIDATION_ERROR"),
        ({"prompt_ids": ["1"]}, 422, "VALIDATION_ERROR"),
        ({"prompt_ids": [True]}, 422, "VALIDATION_ERROR"),
        ({"prompt_ids": [1.5]}, 422, "VALIDATION_ERROR"),
        ({"prompt_ids": "all"}, 422, "VALIDATION_ERROR"),
        ({"prompt_ids": [0, -1, 2**31, 2**63]}, 404, "PROMPT_NOT_FOUND"),
        ({"prompt_ids": [12345]}, 404, "PROMPT_NOT_FOUND"),
        ({"data": {}}, 422, "VALIDATION_ERROR"),
        ({"data": {"prompts": {}}}, 422, "VALIDATION_ERROR"),
        ({"data": {"dataset": "demo/homelab", "folder": "/etc"}}, 422, "VALIDATION_ERROR"),
        ({"data": {"dataset": "nowhere"}}, 404, "DATASET_NOT_FOUND"),
        ({"data": {"dataset": "' OR 1=1 --"}}, 404, "DATASET_NOT_FOUND"),
        ({"data": {"folder": "/etc"}}, 403, "FOLDER_FORBIDDEN"),
        ({"data": {"folder": "etc"}}, 422, "VALIDATION_ERROR"),
        ({**LEARN, "worker_id": 0}, 422, "VALIDATION_ERROR"),
        ({**LEARN, "worker_id": 2**31}, 422, "VALIDATION_ERROR"),
        ({**LEARN, "worker_id": "1"}, 422, "VALIDATION_ERROR"),
        ({**LEARN, "force": True}, 422, "VALIDATION_ERROR"),
    ],
)
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_what_cannot_be_started_is_refused_and_changes_nothing(
    house: House, said: dict[str, Any], status: int, code: str
) -> None:
    session = await house.session()
    before = (await house.ask("ada", "GET", f"{SESSIONS}/{session}")).json()
    answer = await house.start(session, **said)
    assert (answer.status_code, answer.json()["error_code"]) == (status, code), answer.text
    assert (await house.ask("ada", "GET", f"{SESSIONS}/{session}")).json() == before
    assert await house.kinds() == {}


async def test_anothers_prompts_are_not_there(house: House) -> None:
    prompt = await house.prompt("bob")
    session = await house.session("ada")
    assert (await house.start(session, prompt_ids=[prompt])).status_code == 404
    assert (await house.start(session, who="admin", prompt_ids=[prompt])).status_code == 200


async def test_a_session_starts_on_its_prompts_and_its_worker(house: House) -> None:
    async with house.database.transaction() as session:
        session.add(TrainingWorker(id=7, node="nas", label=training_workers.NODE_LABEL))
    prompt, made = await house.prompt(), await house.session()
    unknown = await house.start(made, prompt_ids=[prompt], worker_id=8)
    assert unknown.status_code == 503  # no cluster to look for it
    started = (await house.start(made, prompt_ids=[prompt], worker_id=7)).json()
    expected = {"status": "queued", "worker_id": 7, "prompt_ids": [prompt]}
    assert started.items() >= expected.items()
    job = await house.job(started["job_id"])
    assert (job["kind"], job["created_by"]) == ("fine_tune", "ada")
    assert job["spec"]["labels"] == {training_workers.NODE_LABEL: "nas"}
    assert job["spec"]["data"]["prompts"]["ids"] == [prompt]
    assert (job["spec"]["epochs"], job["spec"]["batch_size"]) == (4, 2)


async def test_a_worker_that_never_was_is_not_found(database: Database) -> None:
    async with database.transaction() as session:
        with pytest.raises(WorkerNotFound):
            await training_workers.labels_of(session, 8)


async def test_what_runs_is_neither_changed_nor_deleted_nor_started_again(house: House) -> None:
    session = await house.session()
    path = f"{SESSIONS}/{session}"
    nothing = await house.ask("ada", "POST", f"{path}/cancel")
    assert nothing.status_code == 409
    job = (await house.start(session)).json()["job_id"]
    for state in (State.QUEUED, State.RUNNING, State.PAUSED):
        await house.settle(job, state=state)
        for answer in (
            await house.start(session),
            await house.ask("ada", "PUT", path, json=SESSION),
            await house.ask("ada", "DELETE", path),
        ):
            assert (answer.status_code, answer.json()["error_code"]) == (409, "TRAINING_SESSION_STARTED")
    cancelled = await house.ask("ada", "POST", f"{path}/cancel")
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert (await house.ask("ada", "POST", f"{path}/cancel")).status_code == 409
    again = await house.start(session)
    assert (again.status_code, again.json()["job_id"] != job) == (200, True)
    assert (await house.ask("ada", "PUT", path, json=SESSION)).status_code == 409
    await house.settle(again.json()["job_id"], state=State.FAILED, error={"code": "x", "message": "No."})
    assert (await house.ask("ada", "DELETE", path)).status_code == 204
    assert await house.kinds() == {"fine_tune": 2}


async def test_of_many_starts_at_once_one_makes_a_job(house: House) -> None:
    session = await house.session()
    answers = await asyncio.gather(*(house.start(session) for _ in range(8)))
    assert Counter(answer.status_code for answer in answers) == {200: 1, 409: 7}
    assert await house.kinds() == {"fine_tune": 1}


async def test_everything_happens_to_one_session_at_once(house: House) -> None:
    for _ in range(3):
        path = f"{SESSIONS}/{await house.session()}"
        wanted: list[tuple[str, str, Any]] = [
            ("POST", f"{path}/start", LEARN),
            ("DELETE", path, None),
            ("PUT", path, SESSION),
            ("POST", f"{path}/cancel", None),
            ("GET", f"{path}/status", None),
        ]
        asked = [house.ask("ada", method, address, json=body) for method, address, body in wanted * 3]
        statuses = {answer.status_code for answer in await asyncio.gather(*asked)}
        assert statuses <= {200, 204, 404, 409}


# How far it is


@pytest.mark.parametrize(
    ("facts", "status"),
    [
        ({"state": State.QUEUED}, "queued"),
        ({"state": State.RUNNING, "phase": None}, "preparing"),
        ({"state": State.RUNNING, "phase": "gathering the data"}, "preparing"),
        ({"state": State.RUNNING, "phase": "training"}, "training"),
        ({"state": State.RUNNING, "phase": "saving the model"}, "training"),
        ({"state": State.PAUSED, "phase": "training"}, "paused"),
        ({"state": State.SUCCEEDED, "progress": 100.0}, "completed"),
        ({"state": State.FAILED, "error": {"code": "out_of_memory", "message": "Too large."}}, "failed"),
        ({"state": State.CANCELLED, "error": {"code": "cancelled", "message": "Cancelled."}}, "cancelled"),
    ],
)
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_every_state_of_a_training_is_told_alike_by_all_doors(
    house: House, facts: dict[str, Any], status: str
) -> None:
    session = await house.session()
    job = (await house.start(session)).json()["job_id"]
    await house.settle(job, **facts)
    found = (await house.ask("ada", "GET", f"/status/{job}")).json()
    assert found["status"] == status
    assert found["error"] == facts.get("error", {}).get("message")
    assert (found["current_epoch"], found["total_epochs"], found["current_step"], found["loss"]) == (
        None,
        4,
        None,
        None,
    )
    told = (await house.ask("ada", "GET", f"{SESSIONS}/{session}/status")).json()
    assert told == {"session_id": session, **{name: found[name] for name in told if name != "session_id"}}
    assert found.keys() - told.keys() == {"job_id", "created_at", "updated_at"}
    assert (await house.ask("ada", "GET", f"{SESSIONS}/{session}")).json()["status"] == status
    assert (await house.ask("ada", "GET", SESSIONS)).json()["items"][0]["status"] == status


async def test_the_newest_numbers_of_a_training_are_told(house: House) -> None:
    job = await house.training(state=State.RUNNING, phase="training", progress=41.67, result=None)
    await house.tell(job, step=9, epoch=0.9, loss=2.5, eval_loss=2.0, memory_mb=512.0)
    await house.tell(job, step=10, epoch=1.0, loss=2.25, learning_rate=1e-4, unheard_of=1)
    found = (await house.ask("ada", "GET", f"/status/{job}")).json()
    expected = {
        "progress": 41.67,
        "current_step": 10,
        "current_epoch": 1,  # at its very end
        "total_epochs": 3,
        "loss": 2.25,
        "eval_loss": 2.0,
        "learning_rate": 1e-4,
        "memory_mb": 512.0,
        "eta_seconds": None,
        "gpu_utilization": None,
    }
    assert found.items() >= expected.items()
    assert "unheard_of" not in found


async def test_an_evaluation_is_told_however_many_steps_ago_it_was(house: House) -> None:
    job = await house.training(state=State.RUNNING, phase="training", result=None)
    await house.tell(job, step=10, epoch=1.0, eval_loss=2.5)
    await house.tell(job, step=20, epoch=2.0, eval_loss=2.0)
    for step in range(21, 46):
        await house.tell(job, step=step, epoch=2.0 + step / 100, loss=1.0)
    assert (await house.ask("ada", "GET", f"/status/{job}")).json()["eval_loss"] == 2.0
    job = await house.training(state=State.RUNNING, phase="training", result=None)
    await house.tell(job, step=40, epoch=4.0, loss=1.0)  # nothing was held out after all
    assert (await house.ask("ada", "GET", f"/status/{job}")).json()["eval_loss"] is None


@pytest.mark.parametrize(
    ("epoch", "max_steps", "current"),
    [(0.0, None, 1), (0.1, None, 1), (1.0, None, 1), (1.1, None, 2), (3.0, None, 3), (1.0, 5, 1), (1.2, 5, 2)],
)
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_the_end_of_an_epoch_still_belongs_to_it(
    house: House, epoch: float, max_steps: int | None, current: int
) -> None:
    job = await house.queue("fine_tune", {**LEARN, "max_steps": max_steps}, state=State.RUNNING)
    await house.tell(job, step=4, epoch=epoch)
    assert (await house.ask("ada", "GET", f"/status/{job}")).json()["current_epoch"] == current


async def test_a_session_with_a_number_of_steps_has_no_number_of_epochs(house: House) -> None:
    session = await house.session(config={"max_steps": 5})
    path = f"{SESSIONS}/{session}/status"
    assert (await house.ask("ada", "GET", path)).json()["total_epochs"] is None
    await house.start(session)
    assert (await house.ask("ada", "GET", path)).json()["total_epochs"] is None


async def forged(house: House, **facts: Any) -> str:
    return await house.queue("forge", {**LEARN, "deploy": False}, **{"state": State.RUNNING} | facts)


async def child(house: House, parent: str, kind: str, spec: dict[str, Any], **facts: Any) -> str:
    return await house.queue(kind, spec, **{"parent_id": parent, "child_name": kind} | facts)


async def test_a_forge_job_is_as_far_as_its_steps(house: House) -> None:
    async def told() -> tuple[str, float, float | None]:
        found = (await house.ask("ada", "GET", f"/status/{forge}")).json()
        return found["status"], found["progress"], found["loss"]

    forge = await forged(house, state=State.QUEUED)
    assert await told() == ("queued", 0, None)
    await house.settle(forge, state=State.RUNNING, phase="fine_tune")
    assert await told() == ("queued", 0, None)
    training = await child(house, forge, "fine_tune", LEARN)
    assert await told() == ("queued", 0, None)
    await house.settle(training, state=State.RUNNING, phase="gathering the data")
    assert await told() == ("preparing", 0, None)
    await house.settle(training, phase="training", progress=50.0)
    await house.tell(training, step=3, epoch=1.5, loss=2.0)
    assert await told() == ("training", 30, 2.0)
    await house.settle(training, state=State.PAUSED)
    assert await told() == ("paused", 30, 2.0)
    await house.settle(training, state=State.SUCCEEDED, progress=100.0)
    steps = (("export", "exporting", 67.5), ("validate", "validating", 82.5))
    for kind, status, progress in steps:
        await house.settle(forge, phase=kind)
        await child(house, forge, kind, {"job_id": training}, state=State.RUNNING, progress=50.0)
        assert await told() == (status, progress, 2.0)
    await house.settle(forge, phase="deploy")
    assert (await told())[0] == "deploying"
    await house.settle(forge, state=State.SUCCEEDED, progress=100.0)
    assert await told() == ("completed", 100, 2.0)
    for state, status in ((State.PAUSED, "paused"), (State.CANCELLED, "cancelled"), (State.FAILED, "failed")):
        await house.settle(forge, state=state)
        assert (await told())[0] == status


async def test_the_rooms_of_a_forge_job_are_also_those_of_its_steps(house: House) -> None:
    admin = Principal(id=house.people["admin"].id, name="admin", is_admin=True)
    forge = await forged(house)
    assert (await training_status(forge, admin))[0] == {f"job:{forge}"}
    training = await child(house, forge, "fine_tune", LEARN)
    export = await child(house, forge, "export", {"job_id": training})
    assert (await training_status(forge, admin))[0] == {f"job:{forge}", f"job:{training}", f"job:{export}"}


async def test_a_job_of_another_kind_is_no_training(house: House) -> None:
    job = await house.queue("probe", {})
    for method, path in (("GET", "/status"), ("POST", "/validate"), ("POST", "/deploy")):
        answer = await house.ask("admin", method, f"{path}/{job}")
        assert (answer.status_code, answer.json()["error_code"]) == (404, "TRAINING_NOT_FOUND")
        assert "probe" in answer.json()["message"]
    assert await house.kinds() == {"probe": 1}


async def test_anothers_training_does_not_exist(house: House) -> None:
    job = await house.training("ada")
    for method, path in (("GET", "/status"), ("POST", "/validate")):
        assert (await house.ask("bob", method, f"{path}/{job}")).status_code == 404
        assert (await house.ask("ada", method, f"{path}/{job}?wait=0")).status_code in {200, 202}


# /v1/fine-tune


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ({"data": None}, 400),
        ({"learning_rate": 0}, 422),
        ({"learning_rate": "0.1"}, 422),
        ({"epochs": True}, 422),
        ({"rank": 2**70}, 422),
        ({"seed": -1}, 422),
        ({"workers": 0}, 422),
        ({"use_pissa": "yes"}, 422),
        ({"pissa": True}, 422),
        ({"name": "other"}, 422),
        ({"project_name": "../x"}, 422),
        ({"project_name": "x\n"}, 422),
        ({"cpus_per_worker": 1e-9}, 422),
        ({"labels": {"": "x"}}, 422),
        ({"labels": {"zone": "x" * 1000}}, 422),
        ({"tags": {"note": "x" * 1_000_000}}, 422),
        ({"base_model": "/etc"}, 403),
        ({"data": {"folder": "/etc"}}, 403),
    ],
)
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_what_cannot_be_fine_tuned_is_refused(house: House, said: dict[str, Any], status: int) -> None:
    answer = await house.ask("ada", "POST", "/v1/fine-tune", json={"project_name": "house", **LEARN, **said})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"] == answer.json()["detail"]
    assert await house.kinds() == {}


@pytest.mark.parametrize("method", ["supervised", "dpo"])
async def test_data_of_another_kind_than_the_method_learns_from_is_refused(house: House, method: str) -> None:
    pair = '{"messages": [{"role": "user", "content": "Hi."}], "chosen": "Good day.", "rejected": "What?"}'
    path = "/api/v1/datasets?name=pairs"
    assert (await house.ask("ada", "POST", path, content=pair)).status_code == 201
    data, other = {"dataset": "pairs"}, {"dataset": "demo/homelab"}
    fitting, unfit = (data, other) if method == "dpo" else (other, data)
    wanted = {"project_name": "house", "method": method}
    refused = await house.ask("ada", "POST", "/v1/fine-tune", json={**wanted, "data": unfit})
    assert refused.status_code == 400
    assert method in refused.json()["detail"]
    session = await house.session(config={"method": method})
    answer = await house.start(session, data=unfit)
    assert (answer.status_code, answer.json()["error_code"]) == (400, "WRONG_KIND_OF_DATA")
    assert await house.kinds() == {}
    assert (await house.ask("ada", "POST", "/v1/fine-tune", json={**wanted, "data": fitting})).status_code == 200
    assert (await house.start(session, data=fitting)).status_code == 200


# /validate


async def test_a_step_gets_what_a_process_of_the_training_had(house: House) -> None:
    spec = {**LEARN, "cpus_per_worker": 4, "gpus_per_worker": 2}
    job = await house.queue("fine_tune", spec, state=State.SUCCEEDED, result={})
    deployment = (await house.ask("admin", "POST", f"/deploy/{job}?wait=0")).json()["deployment_job_id"]
    (validation,) = (await house.job(deployment))["depends_on"]
    (export,) = (await house.job(validation))["depends_on"]
    async with house.database.read_transaction() as session:
        for step, demand in ((validation, "4 CPU, 1 GPU"), (export, "4 CPU")):
            assert (await queue.get(session, step, LOCAL)).demand == demand


async def test_a_training_is_validated_once(house: House) -> None:
    job = await house.training()
    asked = [house.ask("ada", "POST", f"/validate/{job}?wait=0") for _ in range(6)]
    answers = await asyncio.gather(*asked)
    assert {answer.status_code for answer in answers} == {202}
    (validation,) = {answer.json()["validation_job_id"] for answer in answers}
    assert answers[0].json() == {
        "job_id": job,
        "passed": None,
        "metrics": {},
        "report_path": None,
        "reasons": [],
        "validation_job_id": validation,
    }
    metrics = {"final_loss": 1.23, "perplexity": 3.42, "gguf_kl": None}
    result = {"passed": False, "reasons": ["too dull"], "metrics": metrics, "report_path": "validation_report.md"}
    await house.settle(validation, state=State.SUCCEEDED, result={**result, "report_json": "report.json"})
    found = await house.ask("ada", "POST", f"/validate/{job}")
    assert found.status_code == 200
    assert found.json() == {"job_id": job, **result, "validation_job_id": validation}
    assert await house.kinds() == {"fine_tune": 1, "validate": 1}


async def test_a_validation_that_fails_says_why_and_is_tried_again_when_it_is_asked_for(house: House) -> None:
    job = await house.training()
    first = (await house.ask("ada", "POST", f"/validate/{job}?wait=0")).json()["validation_job_id"]
    waiting = asyncio.create_task(house.ask("ada", "POST", f"/validate/{job}?wait=600"))
    hub: Hub = house.app.state.hub
    await eventually_async(lambda: hub.listeners(f"job:{first}"))
    await house.settle(first, state=State.FAILED, error={"code": "out_of_memory", "message": "Too large."})
    hub._deliver({"rooms": [f"job:{first}"]})  # pyright: ignore[reportPrivateUsage]
    failed = await waiting
    assert failed.status_code == 200
    assert failed.json().items() >= {"passed": None, "metrics": {}, "reasons": ["Too large."]}.items()
    again = await house.ask("ada", "POST", f"/validate/{job}?wait=0")
    assert again.status_code == 202
    assert again.json()["validation_job_id"] != first


async def test_what_was_never_trained_is_neither_validated_nor_deployed(house: House) -> None:
    for state in (State.FAILED, State.CANCELLED):
        job = await house.training(state=state, error={"code": "x", "message": "No."})
        for path in ("validate", "deploy"):
            answer = await house.ask("admin", "POST", f"/{path}/{job}")
            assert (answer.status_code, answer.json()["error_code"]) == (409, "JOB_HAS_NO_RESULT")
    assert await house.kinds() == {"fine_tune": 2}


async def test_steps_wait_for_the_training(house: House) -> None:
    job = await house.training(state=State.RUNNING)
    step = (await house.ask("ada", "POST", f"/validate/{job}?wait=0")).json()["validation_job_id"]
    assert (await house.job(step))["depends_on"] == [job]


async def test_what_a_stranger_has_queued_is_no_step_of_ones_own(house: House) -> None:
    job = await house.training("ada")
    strangers = await house.queue("validate", {"job_id": job}, "bob")  # it will fail: the training is not bob's
    own = (await house.ask("ada", "POST", f"/validate/{job}?wait=0")).json()["validation_job_id"]
    assert own != strangers
    helpful = await house.training("ada")
    admins = await house.queue("validate", {"job_id": helpful}, "admin")
    assert (await house.ask("ada", "POST", f"/validate/{helpful}?wait=0")).json()["validation_job_id"] == admins


@pytest.mark.parametrize("wait", ["-1", "601", "nan", "inf", "1e999", "x", ""])
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_nobody_waits_for_an_odd_time(house: House, wait: str) -> None:
    job = await house.training()
    for path in ("validate", "deploy"):
        assert (await house.ask("admin", "POST", f"/{path}/{job}", params={"wait": wait})).status_code == 422
    assert await house.kinds() == {"fine_tune": 1}


# /deploy


async def test_only_administrators_deploy(house: House) -> None:
    job = await house.training("ada")
    refused = await house.ask("ada", "POST", f"/deploy/{job}?wait=0")
    assert refused.status_code == 403
    assert await house.kinds() == {"fine_tune": 1}


async def test_a_deployment_is_three_steps_each_of_which_is_queued_once(house: House) -> None:
    job = await house.training("ada")
    answers = await asyncio.gather(*(house.ask("admin", "POST", f"/deploy/{job}?wait=0") for _ in range(6)))
    assert {answer.status_code for answer in answers} == {202}
    (deployment,) = {answer.json()["deployment_job_id"] for answer in answers}
    assert answers[0].json() == {
        "job_id": job,
        "success": None,
        "model_name": None,
        "gguf_path": None,
        "message": None,
        "deployment_job_id": deployment,
    }
    assert await house.kinds() == {"fine_tune": 1, "export": 1, "validate": 1, "deploy": 1}
    (validation,) = (await house.job(deployment))["depends_on"]
    (export,) = (await house.job(validation))["depends_on"]
    assert (await house.job(export))["depends_on"] == [job]
    assert (await house.job(validation))["spec"]["export_job_id"] == export

    # To be forced is another wish, but the steps before it are the same.
    await house.ask("admin", "POST", f"/deploy/{job}?wait=0&force=true")
    assert await house.kinds() == {"fine_tune": 1, "export": 1, "validate": 1, "deploy": 2}
    # What was measured with the export need not be measured again.
    measured = await house.ask("ada", "POST", f"/validate/{job}?wait=0")
    assert measured.json()["validation_job_id"] == validation


async def test_how_a_deployment_ended_is_told_and_the_next_one_makes_only_what_is_missing(house: House) -> None:
    job = await house.training("ada")
    ends: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (
            {"state": State.FAILED, "error": {"code": "version_not_passed", "message": "Too dull."}},
            {"success": False, "model_name": None, "gguf_path": None, "message": "Too dull."},
        ),
        (
            {"state": State.SUCCEEDED, "result": {"model_name": "forgearr:latest", "gguf_path": "/cache/a.gguf"}},
            {"success": True, "model_name": "forgearr:latest", "gguf_path": "/cache/a.gguf", "message": None},
        ),
    ]
    hub: Hub = house.app.state.hub
    for facts, told in ends:
        step = (await house.ask("admin", "POST", f"/deploy/{job}?wait=0")).json()["deployment_job_id"]
        waiting = asyncio.create_task(house.ask("admin", "POST", f"/deploy/{job}?wait=600"))
        await eventually_async(lambda room=f"job:{step}": hub.listeners(room))
        await house.settle(step, **facts)
        hub._deliver({"rooms": [f"job:{step}"]})  # pyright: ignore[reportPrivateUsage]
        answer = await waiting
        assert answer.status_code == 200
        assert answer.json() == {"job_id": job, **told, "deployment_job_id": step}
    assert await house.kinds() == {"fine_tune": 1, "export": 1, "validate": 1, "deploy": 2}


async def test_what_a_forge_job_has_done_is_not_done_again(house: House) -> None:
    forge = await forged(house)
    training = await child(house, forge, "fine_tune", LEARN, state=State.SUCCEEDED, result={})
    export = await child(house, forge, "export", {"job_id": training}, state=State.SUCCEEDED, result={})
    wanted = {"job_id": training, "export_job_id": export}
    validation = await child(house, forge, "validate", wanted, state=State.SUCCEEDED, result={"passed": True})
    # That the whole came to grief later does not matter.
    await house.settle(forge, state=State.FAILED, error={"code": "x", "message": "No."})
    for named in (forge, training):
        found = await house.ask("ada", "POST", f"/validate/{named}")
        assert (found.status_code, found.json()["validation_job_id"]) == (200, validation)
        assert (await house.ask("admin", "POST", f"/deploy/{named}?wait=0")).status_code == 202
    assert await house.kinds() == {"forge": 1, "fine_tune": 1, "export": 1, "validate": 1, "deploy": 1}


async def test_gates_of_somebodys_own_do_not_open_the_way_to_a_deployment(house: House) -> None:
    job = await house.training("ada")
    export = await house.queue("export", {"job_id": job}, state=State.SUCCEEDED, result={})
    easy = {"job_id": job, "export_job_id": export, "gates": {"max_perplexity": None}}
    generous = await house.queue("validate", easy, state=State.SUCCEEDED, result={"passed": True})
    deployment = (await house.ask("admin", "POST", f"/deploy/{job}?wait=0")).json()["deployment_job_id"]
    (validation,) = (await house.job(deployment))["depends_on"]
    assert validation != generous
    assert (await house.job(validation))["spec"]["gates"] == {}


# Bodies


async def test_bodies_that_are_no_requests_are_refused(house: House) -> None:
    session = await house.session()
    paths = (SESSIONS, f"{SESSIONS}/{session}/start", "/v1/fine-tune")
    for path in paths:
        for body, status in (
            (b"", {422}),
            (b"[]", {422}),
            (b"null", {422}),
            (b'"text"', {422}),
            (b"{", {400}),
            (b"\xff\xfe", {400}),
            (b'{"name": "\\u0000"}', {400}),
            (b'{"name": NaN}', {400}),
            (b'{"config": ' + b'{"tags": ' * 200 + b"1" + b"}" * 201, {400}),
            (b'{"config": ' + b"[" * 100_000, {400}),
            (b'{"name": "' + b"x" * (33 * 1024 * 1024) + b'"}', {413}),
            (b'{"name": "' + b"x" * (4 * 1024 * 1024) + b'"}', {422}),
        ):
            answer = await house.ask("ada", "POST", path, content=body)
            assert answer.status_code in status, (path, body[:40], answer.text[:300])
    assert await house.kinds() == {}
