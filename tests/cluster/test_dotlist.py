"""Assignments after `--set`."""

from typing import Any

import pytest

from cluster.dotlist import assign
from cluster.errors import InvalidRequest


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("steps=3", {"name": "a", "policy": {"min_files": 5}, "steps": 3}),
        ("name=b=c", {"name": "b=c", "policy": {"min_files": 5}}),
        ("policy.min_hours=null", {"name": "a", "policy": {"min_files": 5, "min_hours": None}}),
        ("data.prompts.tags=[new]", {"name": "a", "policy": {"min_files": 5}, "data": {"prompts": {"tags": ["new"]}}}),
    ],
)
def test_an_assignment_sets_a_value(argument: str, expected: dict[str, Any]) -> None:
    target: dict[str, Any] = {"name": "a", "policy": {"min_files": 5}}
    assign(target, argument)
    assert target == expected


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("steps", "--set takes key=value, not 'steps'"),
        ("=3", "--set takes key=value"),
        ("name.first=Ada", "--set name.first is not possible: name is 'a', not a mapping"),
        ("steps=[1", "The value of steps is not valid YAML"),
    ],
)
def test_an_invalid_assignment_is_refused(argument: str, message: str) -> None:
    target: dict[str, Any] = {"name": "a"}
    with pytest.raises(InvalidRequest, match=message.replace("[", r"\[")):
        assign(target, argument)
    assert target == {"name": "a"}
