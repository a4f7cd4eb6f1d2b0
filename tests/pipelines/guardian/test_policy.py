"""The policy that decides when a repository is retrained."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.guardian.git.objects import Changes
from pipelines.guardian.policy import Policy, decide

NOON = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
YESTERDAY = NOON - timedelta(days=1)


def changes(**values: Any) -> Changes:
    defaults: dict[str, Any] = {"commits": 3, "files": 5, "lines": 50, "paths": ("src/a.py",), "rewritten": False}
    return Changes(**{**defaults, **values})


@pytest.mark.parametrize(
    ("policy", "changed", "should_retrain", "reason"),
    [
        ({}, {"files": 20}, True, "20 files changed (threshold: 20)"),
        ({}, {"files": 19}, False, "19 files changed (threshold: 20)"),
        ({"min_files": 1}, {"files": 1}, True, "1 file changed (threshold: 1)"),
        ({"min_commits": 3}, {}, True, "3 commits changed (threshold: 3)"),
        ({"min_lines": 50}, {}, True, "50 lines changed (threshold: 50)"),
        (
            {"min_commits": 4, "min_lines": 51},
            {},
            False,
            "5 files changed (threshold: 20), 3 commits changed (threshold: 4), 50 lines changed (threshold: 51)",
        ),
        ({"min_files": None}, {}, False, "5 files changed, none of them on a critical path"),
        ({"critical_paths": ["src/**"]}, {}, True, "a critical path changed: src/a.py"),
        ({}, {"files": 0, "paths": ()}, False, "nothing has changed since the last training"),
        ({"min_files": None, "min_commits": 1}, {"commits": None}, False, "does not say how many commits"),
        ({"min_files": 5, "min_hours": 25}, {}, False, "but the last training was 24.0 hours ago (at least 25)"),
        ({"min_files": 5, "quiet_hours": "11:00-13:00"}, {}, False, "but these are quiet hours, until 13:00 (UTC)"),
        ({"min_files": 5, "quiet_hours": "22:00-06:00"}, {}, True, ""),
        ({"min_files": 5, "quiet_hours": "22:00-06:00", "timezone": "Asia/Tokyo"}, {}, True, ""),
        ({"min_files": 5, "quiet_hours": "20:00-06:00", "timezone": "Asia/Tokyo"}, {}, False, "quiet hours"),
        ({"min_files": 5, "quiet_hours": "12:00-12:01"}, {}, False, "quiet hours"),
        ({"min_files": 5, "quiet_hours": "11:00-12:00"}, {}, True, ""),
    ],
)
def test_the_policy_decides_by_thresholds_and_times(
    policy: dict[str, Any], changed: dict[str, Any], should_retrain: bool, reason: str
) -> None:
    decision = decide(Policy.model_validate(policy), changes(**changed), YESTERDAY, NOON)
    assert decision.should_retrain is should_retrain
    assert reason in decision.reason


def test_a_repository_without_a_training_is_retrained() -> None:
    decision = decide(Policy(min_files=1000), changes(), None, NOON)
    assert (decision.should_retrain, decision.reason) == (True, "never trained")
    assert decision.metrics.hours_since_last_train is None
    in_quiet_hours = decide(Policy(quiet_hours="11:00-13:00"), changes(), None, NOON)
    assert not in_quiet_hours.should_retrain


def test_a_decision_serializes_as_documented() -> None:
    body = decide(Policy(critical_paths=["a.py"]), changes(commits=15, files=23), YESTERDAY, NOON).model_dump(
        mode="json"
    )
    assert body.keys() == {"should_retrain", "reason", "metrics", "limits", "checked_at"}
    assert body["checked_at"] == "2026-11-21T12:00:00Z"
    assert body["metrics"] == {
        "commits_since_last_train": 15,
        "files_changed": 23,
        "critical_paths_changed": True,
        "lines_changed": 50,
        "hours_since_last_train": 24.0,
        "feedback_since_last_train": None,
        "rewritten": False,
    }


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("*.proto", "api/v1/a.proto", True),
        ("*.proto", "a.proto.txt", False),
        ("src/*.py", "src/a.py", True),
        ("src/*.py", "src/deep/a.py", False),
        ("src/**/a.py", "src/a.py", True),
        ("src/**/a.py", "src/x/y/a.py", True),
        ("src/", "src/x/y/a.py", True),
        ("src/**", "other/src/a.py", False),
        ("/Makefile", "Makefile", True),
        ("/Makefile", "sub/Makefile", False),
        ("Makefile", "sub/Makefile", True),
        ("a?c", "abc", True),
        ("a?c", "a/c", False),
        ("a.c", "abc", False),
        ("docs/[x].md", "docs/[x].md", True),
    ],
)
def test_critical_paths_are_matched_by_patterns(pattern: str, path: str, matches: bool) -> None:
    decision = decide(Policy(critical_paths=[pattern]), changes(paths=("zzz", path)), YESTERDAY, NOON)
    assert decision.metrics.critical_paths_changed is matches


@pytest.mark.parametrize(
    "policy",
    [
        {"min_files": 0},
        {"min_hours": -1},
        {"quiet_hours": "25:00-06:00"},
        {"quiet_hours": "22-06"},
        {"timezone": "Mars/Base"},
        {"critical_paths": [""]},
        {"unknown": 1},
    ],
)
def test_an_invalid_policy_is_refused(policy: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Policy.model_validate(policy)
