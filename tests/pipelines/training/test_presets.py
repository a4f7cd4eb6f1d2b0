"""The shipped recipes and presets are valid specs."""

from importlib.resources import files
from typing import Any

import pytest
import yaml

from cluster.cli.train import shipped_recipes
from pipelines.training import presets
from pipelines.training.data.parsing import parse_samples
from pipelines.training.spec import FineTuneSpec, ForgeSpec

CONFIGS = files("configs")


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_is_a_valid_spec(name: str) -> None:
    recipe = yaml.safe_load((CONFIGS / "recipes" / f"{name}.yaml").read_text())
    spec = ForgeSpec.model_validate(recipe).model_dump(mode="json")
    flat: dict[str, Any] = {**recipe, "data": {**spec["data"], **recipe["data"]}}
    assert {key: spec[key] for key in flat} == flat


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_sets_the_defaults_of_a_spec(name: str) -> None:
    preset = presets.read(name)
    spec = FineTuneSpec.model_validate({"base_model": name, "rank": 7, "data": {"dataset": "any"}})
    assert spec.rank == 7
    values = spec.model_dump()
    assert {key: values[key] for key in preset if key != "rank"} == {
        key: value for key, value in preset.items() if key != "rank"
    }
    assert spec.base_model != name


def test_the_demo_dataset_has_enough_samples() -> None:
    samples = parse_samples((CONFIGS / "demo" / "homelab.jsonl").read_text(), "the demo")
    calls = [sample for sample in samples if any(message.tool_calls for message in sample.messages)]
    assert len(samples) >= 40
    assert len(calls) >= 8
    assert len({sample.messages[1].content for sample in samples}) == len(samples)
