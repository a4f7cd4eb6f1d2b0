"""The checkpoints of a training that are in storage, and in the state of its job.

A checkpoint is stored, then recorded in the state together with its manifest: the training state that belongs to it,
and the size and SHA-256 of each file. Then those that it replaces are deleted. The newest two are kept, so a training
whose newest checkpoint is damaged continues from the one before.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cluster import storage
from cluster.errors import ForgearrError
from jobs.context import Context

KEPT = 2
BATCH_SETTINGS = ("batch_size", "gradient_accumulation")
"""What a training keeps when it goes back to an older checkpoint: larger batches did not fit into memory."""


class CheckpointsDamaged(ForgearrError):
    """No checkpoint of this training is whole."""

    code = "CHECKPOINTS_DAMAGED"


def describe(folder: Path, address: str, added: Iterable[str]) -> dict[str, Any]:
    """The files of a manifest: those of a local folder, which was stored at `address`, and those added to it there."""
    files: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            files[path.relative_to(folder).as_posix()] = _describe(file)
    for name in added:
        with storage.open_file(f"{address}/{name}") as file:
            files[name] = _describe(file)
    return files


def add(state: dict[str, Any], address: str, files: Mapping[str, Any], training_state: Mapping[str, Any]) -> set[str]:
    """Record a new checkpoint in the state. Returns the addresses that the state does not need any more."""
    step, place = str(training_state["step"]), dict(training_state)
    addresses: dict[str, str] = {**state.get("checkpoints", {}), step: address}
    manifests: dict[str, Any] = {**state.get("manifests", {}), step: {"place": place, "files": dict(files)}}
    newest = sorted(addresses, key=int)[-KEPT:]
    places = [place, state.get("place", {}), *(manifests[number]["place"] for number in newest if number in manifests)]
    needed = {*newest, *(str(place.get("best_step")) for place in places)}
    replaced = {*state.get("checkpoints", {}).values()}
    state["place"] = place
    state["checkpoints"] = {number: address for number, address in addresses.items() if number in needed}
    state["manifests"] = {number: manifest for number, manifest in manifests.items() if number in needed}
    return replaced - set(state["checkpoints"].values())


def require_whole(context: Context, state: dict[str, Any]) -> None:
    """Have the state continue from its newest checkpoint that is whole, and say so if it is not the newest one."""
    damage_by_step: dict[str, str] = {}
    for step in sorted(state.get("checkpoints", {}), key=int, reverse=True):
        damage = _find_damage(state, step)
        if damage is None:
            return _go_back(context, state, step, damage_by_step)
        damage_by_step[step] = damage
    if damage_by_step:
        reasons = "; ".join(f"of step {step}, {damage}" for step, damage in damage_by_step.items())
        raise CheckpointsDamaged(
            f"No checkpoint of this training is whole: {reasons}. Restore jobs/{context.job_id} in storage from a "
            "backup and retry the job, or submit it again, to train from the beginning."
        )


def _go_back(context: Context, state: dict[str, Any], step: str, damage_by_step: Mapping[str, str]) -> None:
    """Forget the damaged checkpoints, which are newer than this step."""
    if not damage_by_step:
        return
    for damaged_step, damage in damage_by_step.items():
        context.log(
            f"The checkpoint of step {damaged_step} is damaged: {damage}. The training continues from step {step}.",
            "WARNING",
        )
    damaged = [state["checkpoints"][damaged_step] for damaged_step in damage_by_step]
    batch = {name: state["place"][name] for name in BATCH_SETTINGS if name in state["place"]}
    state["place"] = {**state["manifests"][step]["place"], **batch}
    for name in ("checkpoints", "manifests"):
        state[name] = {number: value for number, value in state[name].items() if number not in damage_by_step}
    context.checkpoint(state)
    for address in damaged:
        storage.remove(address)


def _find_damage(state: Mapping[str, Any], step: str) -> str | None:
    """What is wrong with a checkpoint. None: it is whole, as far as is known."""
    address, manifest = state["checkpoints"][step], state.get("manifests", {}).get(step)
    if not storage.exists(address):
        return "its folder is missing"
    if manifest is None:  # it was saved by a version that recorded the newest training state only
        return None if step == str(state["place"].get("step")) else "its training state is unknown"
    for name, expected in manifest["files"].items():
        try:
            size = storage.size(f"{address}/{name}")
        except FileNotFoundError:
            return f"{name} is missing"
        if size != expected["bytes"]:
            return f"{name} has {size} bytes instead of {expected['bytes']}"
        with storage.open_file(f"{address}/{name}") as file:
            if _describe(file) != expected:
                return f"{name} has changed since it was saved"
    return None


def _describe(file: Any) -> dict[str, Any]:
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": file.seek(0, os.SEEK_END), "sha256": sha256}
