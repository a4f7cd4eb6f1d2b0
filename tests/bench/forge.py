"""The forge's figures: a training step, what surrounds a short training, and an export, each next to plain tools."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from pipelines.training import tiny
from tests.bench.figures import Figure, figure_of_pairs
from tests.platform import Platform

STEP, SHORT, EXPORT = "A training step", "Around a short training", "An export"
HERE = Path(__file__).parent
MINUTES = 5
NAME = "bench"

SMALL = (512, 8)
"""Width and layers of the model whose steps are measured: 27 million parameters, half a second on one core."""
LARGE = (768, 14)
"""Of the one that is exported and served: 102 million."""
STEPS, SHORT_STEPS = 40, 10
WARM_UP = 3
"""The first steps allocate what the later ones use again."""
QUESTION_CHARACTERS, ANSWER_CHARACTERS = 300, 600
RATE = 2e-4


def steps(platform: Platform, rounds: int = 2) -> list[Figure]:
    """The platform runs beside both, and its worker tells every step: to the journal, to MLflow and to listeners."""
    base = random_llama(platform, *SMALL)
    data = _long_samples(platform.home / "long.jsonl")
    _upload(platform, data)
    pairs: list[tuple[float, float]] = []
    losses: list[tuple[float, float]] = []
    for _ in range(rounds):
        bare = _bare(platform, base, data, STEPS, batch_size=1)
        job = _train(platform, base, data, STEPS, batch_size=1)
        told = [event for event in _events(platform, job["id"]) if "loss" in event["data"].get("metrics", {})]
        theirs = [step["at"] for step in bare["steps"]]
        pairs.append((_typical(_elapsed(told)), _typical(theirs)))
        losses.append((told[-1]["data"]["metrics"]["loss"], bare["steps"][-1]["loss"]))
    note = f"{STEPS} steps of 27 million parameters; the last losses were {losses}"
    return [figure_of_pairs(STEP, "a step with LoRA, one thread", "s", "a script with TRL alone", pairs, note)]


def short(platform: Platform, rounds: int = 2) -> list[Figure]:
    """Ten steps of forgearr/tiny on the demo's samples."""
    data = Path(str(files("configs") / "demo" / "homelab.jsonl"))
    _upload(platform, data)
    base = _tiny(platform)
    figures: list[Figure] = []
    for workers in (1, 2):
        bare = [_stretches_of_bare(_bare(platform, base, data, SHORT_STEPS, 4, workers)) for _ in range(rounds)]
        ours = [
            _stretches_of_job(platform, _train(platform, tiny.NAME, data, SHORT_STEPS, 4, workers))
            for _ in range(rounds)
        ]
        peer = "a script with TRL alone" if workers == 1 else "the same with torchrun"
        for name in ours[0]:
            figures.append(
                figure_of_pairs(
                    SHORT,
                    f"{name}, {workers} worker" if workers == 1 else f"{name}, {workers} workers",
                    "s",
                    peer,
                    [(one[name], other[name]) for one, other in zip(ours, bare, strict=True)],
                )
                if name in bare[0]
                else Figure(
                    SHORT, f"{name}, {workers} workers", "s", median(one[name] for one in ours), rounds=[*ours]
                )
            )
    return figures


def export(platform: Platform, rounds: int = 2) -> tuple[list[Figure], str]:
    """Also returns the served file's name: a version that an engine can run."""
    base = random_llama(platform, *LARGE)
    data = _long_samples(platform.home / "long.jsonl")
    _upload(platform, data)
    model = _train(platform, base, data, 1, batch_size=1, tuning="full")
    scripts = Path(_python(platform, "-c", CONVERTER).strip())
    figures: list[Figure] = []
    reference = ""
    for quantization in ("f16", "q8_0"):
        converted: list[tuple[float, float]] = []
        whole: list[tuple[float, float]] = []
        for _ in range(rounds):
            by_hand = _by_hand(platform, scripts, Path(model["result"]["model"].removeprefix("file://")), quantization)
            spec = {"job_id": model["id"], "name": NAME, "quantizations": [quantization]}
            job = platform.wait_for(platform.submit("export", spec=spec), seconds=60 * MINUTES)
            assert job["state"] == "succeeded", job["error"]
            reference = f"{NAME}:v{job['result']['version']}"
            times = _moments(platform, job)
            proving = next(at for phase, at in times if phase.startswith("proving"))
            converting = next(at for phase, at in times if phase in {"converting", "merging"})
            converted.append((proving - converting, by_hand))
            whole.append((job["result"]["files"][0]["seconds"], by_hand))
        peer = "convert_hf_to_gguf.py by hand"
        figures += [
            figure_of_pairs(EXPORT, f"102 million parameters to {quantization}, converted", "s", peer, converted),
            figure_of_pairs(EXPORT, "  … with its hash, and proven in llama.cpp", "s", peer, whole),
        ]
    return figures, reference
