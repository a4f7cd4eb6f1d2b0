"""Workers and the dispatcher are killed again and again, and no job is blamed for it."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.settings import load_settings
from tests.support.platform import Platform, running_platform
from tests.support.waiting import eventually

pytestmark = [pytest.mark.platform, pytest.mark.deep]

KILLS, JOBS, STEPS = 40, 300, 20
SECONDS_BETWEEN_KILLS = 3


def test_no_job_fails_because_of_40_kills_and_a_deadly_job_is_still_stopped() -> None:
    modules = [*load_settings().settings.jobs.modules, "tests.support.job_kinds"]
    settings = {"jobs.modules": f"[{', '.join(modules)}]", "mlflow.enabled": "false"}
    with running_platform(settings) as platform:
        with ThreadPoolExecutor(8) as threads:
            submitted = [threads.submit(platform.submit, spec={"steps": STEPS, "seconds": 20}) for _ in range(JOBS)]
            jobs = [future.result() for future in submitted]
        eventually(lambda: platform.count("running") > 0)
        _kill_at_random(platform, random.Random(5))
        deadly = platform.wait_for(platform.submit("deadly", priority=9))
        assert (deadly["state"], deadly["error"]["code"]) == ("failed", "worker_lost")
        for job_id in jobs:
            assert platform.wait_for(job_id)["state"] == "succeeded", platform.job(job_id)


def _kill_at_random(platform: Platform, chance: random.Random) -> None:
    for _ in range(KILLS):
        victims = eventually(lambda: platform.processes("ray::Worker") + platform.processes("ray::Dispatcher"))
        chance.choice(sorted(victims, key=lambda process: process.pid)).kill()
        time.sleep(SECONDS_BETWEEN_KILLS)  # not a wait: the rhythm of the kills is what is tried
