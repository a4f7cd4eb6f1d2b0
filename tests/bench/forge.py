"""The forge's figures: a training step, what surrounds a short training, and an export, each next to plain tools."""

import json
import random
import sys
import time
from datetime import datetime
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.figures import Figure, compare, figure_of_pairs
from tests.support.platform import Platform

STEP, SHORT, EXPORT = "A training step", "Around ten steps of forgearr/tiny", "An export"
NAME = "bench"

SMALL = (512, 8)
"""Width and layers of the model whose steps are measured: 27 million parameters, half a second on one core."""
LARGE = (768, 14)
"""Of the one that is exported and served: 102 million."""
STEPS, SHORT_STEPS = 30, 10
WARM_UP = 3
"""The first steps allocate what the later ones use again."""
LONG, BRIEF = 900, 120
"""Characters of a sample."""

FETCH_CONVERTER = "from pipelines.training.export import llama_converter; print(llama_converter.locate_converter())"
FIND_TINY = "from pipelines.training.models import tiny; print(tiny.model_folder())"
FORGE_IMPORTS = "import pipelines.training.fine_tune.recipe, ray.train.torch"


def step(platform: Platform, rounds: int = 2) -> list[Figure]:
    """The platform runs beside both; ours tells of every step."""
    base = random_llama(platform, *SMALL)
    data = _samples(platform, LONG)
    pairs: list[tuple[float, float]] = []
    losses: list[list[float]] = []
    for _ in range(rounds):
        bare = _bare(platform, base, data, STEPS)
        told = _told_steps(platform.events(_train(platform, base, data, STEPS)["id"]))
        pairs.append((_typical(_elapsed(told)), _typical([one["at"] for one in bare["steps"]])))
        losses.append([told[-1]["data"]["metrics"]["loss"], bare["steps"][-1]["loss"]])
    note = f"median of {STEPS - WARM_UP - 1} steps; the last losses, ours and bare: {losses}"
    return [figure_of_pairs(STEP, "27 M parameters, LoRA, 1 thread", "s", "a script with TRL alone", pairs, note)]


def short(platform: Platform, workers: int, rounds: int = 2) -> list[Figure]:
    """Where the time of a short training goes that is not spent in its steps."""
    base = _python(platform, "-c", FIND_TINY)
    data = _samples(platform, BRIEF)
    bare = [_stretches_of_script(*_timed_bare(platform, base, data, workers)) for _ in range(rounds)]
    ours = [
        _stretches_of_job(platform, _train(platform, "forgearr/tiny", data, SHORT_STEPS, workers=workers))
        for _ in range(rounds)
    ]
    group = f"{SHORT}, {workers} worker{'s' * (workers > 1)}"
    peer = "a script with TRL alone" if workers == 1 else "the script, by torchrun"
    figures: list[Figure] = []
    for name in ours[0]:
        times = [one[name] for one in ours]
        if name in bare[0]:
            pairs = list(zip(times, [one[name] for one in bare], strict=True))
            figures.append(figure_of_pairs(group, name, "s", peer, pairs))
        else:
            figures.append(Figure(group, name, "s", median(times), rounds=list(times)))
    return figures


def imports(platform: Platform, rounds: int = 2) -> list[Figure]:
    """What a process of a training imports, which most of its start consists of."""

    def ours() -> float:
        return _seconds(platform, "-c", FORGE_IMPORTS)

    def theirs() -> float:
        return _seconds(platform, "-c", "import datasets; from trl import SFTConfig, SFTTrainer; import peft")

    return [compare(SHORT, "the imports by themselves", "s", ours, "those of the script", theirs, rounds)]


def export(platform: Platform, rounds: int = 2) -> tuple[list[Figure], str, Path]:
    """Returns the last version that it has made, too, and its file: an engine can serve it."""
    base = random_llama(platform, *LARGE)
    made = _train(platform, base, _samples(platform, LONG), 1, tuning="full")
    model = made["result"]["model"]
    scripts = _python(platform, "-c", FETCH_CONVERTER)
    figures: list[Figure] = []
    job: dict[str, Any] = {}
    for quantization in ("f16", "q8_0"):

        def by_hand(quantization: str = quantization) -> float:
            return _convert_by_hand(platform, scripts, model, quantization)

        def ours(quantization: str = quantization) -> float:
            target = str(platform.home / "ours.gguf")
            return float(_python(platform, "-m", "tests.bench.our_conversion", model, target, quantization, scripts))

        peer = "convert_hf_to_gguf.py by hand"
        converted = compare(EXPORT, f"102 M parameters to {quantization}", "s", ours, peer, by_hand, rounds)
        spec = {"job_id": made["id"], "name": NAME, "quantizations": [quantization]}
        job = _done(platform, platform.submit("export", spec=spec))
        assert converted.peer is not None
        pair = (job["result"]["files"][0]["seconds"], converted.peer)
        whole = figure_of_pairs(EXPORT, "  … hashed, loaded and run, in the job", "s", peer, [pair])
        figures += [converted, whole]
    file = platform.home / "cache" / "models" / f"{job['result']['files'][0]['sha256']}.gguf"
    return figures, f"{NAME}:v{job['result']['version']}", file


def random_llama(platform: Platform, width: int, layers: int) -> str:
    folder = platform.home / "bases" / f"{width}-{layers}"
    if not folder.exists():
        _python(platform, "-m", "tests.bench.random_llama", str(folder), str(width), str(layers))
    return str(folder)


def _samples(platform: Platform, characters: int) -> Path:
    """A dataset of that name, and the file that it was made from: pieces of the text that forgearr/tiny knows."""
    path = platform.home / f"text-{characters}.jsonl"
    if path.exists():
        return path
    text = (files("configs") / "tiny" / "corpus.txt").read_text()
    chance = random.Random(7)
    starts = [chance.randrange(len(text) - characters) for _ in range(60)]
    pieces = [(text[at : at + characters // 3], text[at + characters // 3 : at + characters]) for at in starts]
    lines = [
        json.dumps({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]})
        for asked, answered in pieces
    ]
    path.write_text("\n".join(lines) + "\n")
    answer = platform.http.post("/api/v1/datasets", params={"name": path.stem}, content=path.read_bytes())
    assert answer.status_code == 201, answer.text
    return path


def _train(platform: Platform, base: str, data: Path, steps: int, **more: Any) -> dict[str, Any]:
    """A fine_tune job that has succeeded."""
    spec = {
        "name": NAME,
        "base_model": base,
        "data": {"dataset": data.stem},
        "max_steps": steps,
        "batch_size": 1,
        "eval_split": 0,
        **more,
    }
    return _done(platform, platform.submit("fine_tune", spec=spec))


def _done(platform: Platform, job_id: str) -> dict[str, Any]:
    job = platform.wait_for(job_id)
    assert job["state"] == "succeeded", job["error"]
    return job


def _bare(platform: Platform, base: str, data: Path, steps: int, workers: int = 1) -> dict[str, Any]:
    """When the script of bare_training.py did what."""
    wanted = {"base": base, "data": str(data), "steps": steps, "output": str(platform.home / "bare")}
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={workers}"] if workers > 1 else []
    script = str(Path(__file__).parent / "bare_training.py")
    return json.loads(_python(platform, *launch, script, json.dumps(wanted)))


def _timed_bare(platform: Platform, base: str, data: Path, workers: int) -> tuple[float, dict[str, Any], float]:
    started = time.time()
    told = _bare(platform, base, data, SHORT_STEPS, workers)
    return started, told, time.time()


def _stretches_of_script(started: float, told: dict[str, Any], ended: float) -> dict[str, float]:
    moments = [one["at"] for one in told["steps"]]
    return {
        "from submit to the first step's end": moments[0] - started,
        "  … the process starts": told["started"] - started,
        "  … imports, samples, model": told["loaded"] - told["started"],
        "  … first step": moments[0] - told["loaded"],
        "the other 9 steps": moments[-1] - moments[0],
        "from the last step to the end": ended - moments[-1],
        "  … saving the model": told["saved"] - moments[-1],
        "  … after that": ended - told["saved"],
    }


def _stretches_of_job(platform: Platform, job: dict[str, Any]) -> dict[str, float]:
    events = platform.events(job["id"])
    moments = [_moment(event) for event in _told_steps(events)]
    submitted, ended = (datetime.fromisoformat(job[name]).timestamp() for name in ("created_at", "finished_at"))
    # A phase that lasts less than half a second may be told with the next one: these two are not.
    phases = {event["data"]["phase"]: _moment(event) for event in reversed(events) if event["data"].get("phase")}
    began = phases["gathering the data"]
    kept = next(_moment(event) for event in events if event["type"] == "artifact")
    return {
        "from submit to the first step's end": moments[0] - submitted,
        "  … the process starts": began - submitted,
        "  … imports, samples, model": phases["training"] - began,
        "  … first step": moments[0] - phases["training"],
        "the other 9 steps": moments[-1] - moments[0],
        "from the last step to the end": ended - moments[-1],
        "  … saving the model": kept - moments[-1],
        "  … after that": ended - kept,
    }


def _told_steps(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if "loss" in event["data"].get("metrics", {})]


def _elapsed(told: list[dict[str, Any]]) -> list[float]:
    """Seconds after the training's begin at which each step but the last was done, by the trainer's own clock.

    A report's eta is what the steps so far took on average, times those that are left.
    """
    steps = [event["data"]["metrics"] for event in told[:-1]]
    return [one["eta_seconds"] * one["step"] / (len(told) - one["step"]) for one in steps]


def _typical(moments: list[float]) -> float:
    return median(later - earlier for earlier, later in pairwise(moments[WARM_UP:]))


def _moment(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["created_at"]).timestamp()


def _convert_by_hand(platform: Platform, scripts: str, model: str, quantization: str) -> float:
    script = str(Path(__file__).parent / "bare_converter.py")
    arguments = [model, "--outfile", str(platform.home / "by-hand.gguf"), "--outtype", quantization]
    command = ["/usr/bin/env", f"PYTHONPATH={scripts}/gguf-py:{scripts}", sys.executable, script, *arguments]
    started = time.perf_counter()
    platform.run(command)
    return time.perf_counter() - started


def _seconds(platform: Platform, *arguments: str) -> float:
    started = time.perf_counter()
    _python(platform, *arguments)
    return time.perf_counter() - started


def _python(platform: Platform, *arguments: str) -> str:
    """The last line that it prints. One thread, like a job that asks for one CPU."""
    command = ["/usr/bin/env", "OMP_NUM_THREADS=1", sys.executable, *arguments]
    printed = platform.run(command).stdout.splitlines()
    return printed[-1] if printed else ""
