"""Presets: recommended settings for a base model, by a short name (configs/models/NAME.yaml). A spec overrides them."""

from functools import cache
from importlib.resources import files
from typing import Any

import yaml

FOLDER = files("configs") / "models"


@cache
def names() -> list[str]:
    return sorted(file.name.removesuffix(".yaml") for file in FOLDER.iterdir() if file.name.endswith(".yaml"))


@cache
def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def apply_preset(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec, completed with the preset that its base model names, if any."""
    name = spec.get("base_model")
    if name not in names():
        return spec
    return {**read(str(name)), **{key: value for key, value in spec.items() if key != "base_model"}}
