"""The rules of audits: those that ship, against what services really have, and those that users write."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.services.capabilities.settings import SettingsEntry
from cluster.services.catalog import find_connector
from cluster.settings import get_settings
from pipelines.media.audit import rules
from pipelines.media.audit.conditions import Expectation
from pipelines.media.audit.evaluate import evaluate_rules, to_storable
from pipelines.media.audit.rules import Rule
from tests.support.audit_rules import settings_of
from tests.support.services.openapi_documents import document_path

pytestmark = pytest.mark.usefixtures("home")

RULE = """
- id: mine.cache
  service: sabnzbd
  area: misc
  setting: cache_limit
  expect: {equals: 1G}
  apply: {set: 1G}
  category: performance
  priority: low
  rationale: Because.
  explanation: Because of that.
  impact: Some.
  references: []
"""
PLEX_PREFERENCES = {
    "FSEventLibraryUpdatesEnabled",
    "FSEventLibraryPartialScanEnabled",
    "ScheduledLibraryUpdatesEnabled",
    "autoEmptyTrash",
    "allowMediaDeletion",
    "ScannerLowPriority",
    "GenerateBIFBehavior",
    "secureConnections",
    "HardwareAcceleratedCodecs",
}
"""As servers have told them (`/:/prefs`), some with a capital and some without: Plex has no document of them."""
PROWLARR = {
    "applications[]": {"syncLevel"},
    "indexer[]": {"protocol", "enable", "fields.baseSettings.queryLimit", "fields.baseSettings.grabLimit"},
    "health[]": {"message", "wikiUrl"},
}
"""Taken by hand from its official document (`ApplicationResource`, `IndexerResource`, `HealthResource`), which leaves
the names of fields open: those two are in its sources (`IndexerBaseSettings`)."""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("FORGEARR_AUDIT__RULES", str(tmp_path))
    get_settings.cache_clear()

    def write(text: str, name: str = "mine.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def shipped(service: str) -> list[Rule]:
    return [rule for rule in rules.load().rules if rule.service == service]


def test_there_are_rules_for_five_services_and_all_can_be() -> None:
    known = rules.load()
    assert known.problems == []
    assert len(known.rules) >= 100
    assert {rule.service for rule in known.rules} == {"sonarr", "radarr", "sabnzbd", "prowlarr", "plex"}
    assert len({rule.id for rule in known.rules}) == len(known.rules)
    for rule in known.rules:
        assert rule.recommended_value is not None, rule.id
        # What is set must be what is expected: else applying would change nothing for the better.
        if not rule.apply.is_by_hand:
            assert rule.expect.holds(rule.apply.set, SettingsEntry("", "", {}), {}), rule.id


@pytest.mark.parametrize("service", ["sonarr", "radarr"])
def test_the_official_documents_have_every_setting(service: str) -> None:
    document = json.loads(document_path(service).read_text())
    named = {place for rule in shipped(service) for place in settings_of(rule)}
    assert len(named) > 25
    for area, setting in sorted(named):
        answer = document["paths"][f"/api/v3/{area.removesuffix('[]')}"]["get"]["responses"]["200"]["content"]
        schema = next(iter(answer.values()))["schema"]
        reference = schema["items"]["$ref"] if area.endswith("[]") else schema["$ref"]
        properties = document["components"]["schemas"][reference.rpartition("/")[2]]["properties"]
        assert setting.partition(".")[0] in properties, (area, setting)
        allowed = _allowed(document, properties.get(setting, {}))
        for rule in shipped(service):
            if allowed and (rule.area, rule.setting) == (area, setting):
                wanted = [rule.expect.equals, *(rule.expect.one_of or [])]
                assert [value for value in wanted if value is not None and value not in allowed] == [], rule.id


def test_plex_and_prowlarr_have_every_setting() -> None:
    for rule in shipped("plex"):
        assert {setting for _, setting in settings_of(rule)} <= PLEX_PREFERENCES
    for rule in shipped("prowlarr"):
        assert all(setting in PROWLARR[area] for area, setting in settings_of(rule)), rule.id


def test_a_user_adds_changes_and_disables_rules(write: Any) -> None:
    before = rules.load().rules
    write(RULE + "\n- {id: sabnzbd.pre-check, enabled: false}\n- {id: sonarr.hardlinks, priority: low}\n")
    known = rules.load()
    assert known.problems == []
    by_id = {rule.id: rule for rule in known.rules}
    assert by_id.keys() == {rule.id for rule in before} - {"sabnzbd.pre-check"} | {"mine.cache"}
    assert by_id["sonarr.hardlinks"].priority == "low"
    assert by_id["sonarr.hardlinks"].setting == "copyUsingHardlinks"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("- {id: a\n", 2, "It cannot be read"),
        ("id: a\n", 1, "must be a list of rules"),
        ("\n- 5\n", 2, "A rule must be a mapping with an id"),
        (RULE.replace("low", "urgent"), 9, "priority: Input should be 'critical', 'high', 'medium' or 'low'"),
        (RULE.replace("equals: 1G", "equals: 1G, at_least: 5"), 6, "expect: give one of"),
        (RULE.replace("{equals: 1G}", "{matches: '('}"), 6, "expect.matches: is not a regular expression"),
        (RULE.replace("  area: misc", "  area: config/misc"), 2, "SABnzbd has no area 'config/misc'"),
        (RULE.replace("  area: misc", "  area: 'servers[]'"), 2, "'servers[]' can only be changed by hand"),
        (RULE.replace("cache_limit", "api_key"), 2, "a secret can only be changed by hand"),
        (RULE.replace("service: sabnzbd", "service: tautulli"), 2, "the settings of Tautulli cannot be read"),
        (RULE.replace("service: sabnzbd", "service: nothing"), 2, "There is no type of service named 'nothing'"),
        (RULE + "  colour: red\n", 14, "colour: Extra inputs are not permitted"),
        (RULE.replace("references: []", "references: [javascript:x]"), 13, "begins with https://"),
        ("- {id: sonarr.hardlinks, priority: 5}\n", 1, "priority"),
        ("- &a [x]\n" + "- *a\n" * 200, 1, "at most 100 aliases"),
    ],
)
def test_what_cannot_be_is_named_by_file_and_line_and_stops_nothing_else(
    write: Any, text: str, line: int, words: str
) -> None:
    shipped_ids = {rule.id for rule in rules.load().rules}
    file = write(text)
    write(RULE.replace("mine.cache", "mine.other"), "other.yaml")
    known = rules.load()
    problem = known.problems[0]
    assert (problem.file, problem.line) == (file, line), problem
    assert words in problem.message
    assert str(problem).startswith(f"{file}:{line}: ")
    assert {rule.id for rule in known.rules} == shipped_ids | {"mine.other"}


@pytest.mark.parametrize(
    ("expectation", "fine", "wrong"),
    [
        ({"equals": True}, [True, 1, "1", "true"], [False, 0, "0", None, "yes", [], {}]),
        ({"equals": "1G"}, ["1G", " 1G"], ["500M", None, 1]),
        ({"one_of": [10, None]}, [10, "10", None], [11, "x"]),
        ({"between": [10, 120]}, [10, "120", 15.5], [0, 9, 121, "many", None, [15]]),
        ({"at_least": 1}, [1, "2", 10**30], [0, "0", "x", None]),
        ({"at_most": 1}, [1, 0, -5], [2, "2", None]),
        ({"empty": False}, ["x", 0, [1]], ["", None, []]),
        ({"empty": True}, ["", None, []], ["x", 0]),
        ({"matches": "[1-9]"}, ["500M", 5], ["", "0", None]),
        ({"not_matches": r"\*$"}, ["tv", "", None], ["tv*"]),
        ({"different_from": "other"}, ["b", None, 1], ["a"]),
    ],
)
def test_expectations(expectation: dict[str, Any], fine: list[Any], wrong: list[Any]) -> None:
    wanted = Expectation.model_validate(expectation)
    entry = SettingsEntry("", "", {"other": "a"})
    assert [wanted.holds(value, entry, {}) for value in fine] == [True] * len(fine)
    assert [wanted.holds(value, entry, {}) for value in wrong] == [False] * len(wrong)


def test_a_folder_is_inside_another_only_by_whole_names() -> None:
    wanted = Expectation.model_validate({"outside": {"area": "rootfolder[]", "setting": "path"}})
    read = {"rootfolder[]": [SettingsEntry("1", "/tv", {"path": "/tv/"}), SettingsEntry("2", "", {"path": None})]}
    assert wanted.holds("/tv2/x", SettingsEntry("", "", {}), read)
    assert not wanted.holds("/tv", SettingsEntry("", "", {}), read)
    assert not wanted.holds("/tv/x", SettingsEntry("", "", {}), read)


def rule(**said: Any) -> Rule:
    base = {
        "id": "x",
        "service": "sonarr",
        "area": "indexer[]",
        "setting": "enableRss",
        "expect": {"equals": True},
        "apply": {"by_hand": "Do."},
        "category": "security",
        "priority": "low",
        "rationale": "r",
        "explanation": "e",
        "impact": "i",
        "references": [],
    }
    return Rule.model_validate({**base, **said})


def test_lists_are_looked_at_one_by_one_or_as_a_whole() -> None:
    things = [SettingsEntry("1", "One", {"enableRss": False}), SettingsEntry("2", "Two", {"enableRss": True})]
    each, some, every = rule(), rule(over="some"), rule(over="all")
    assert [found.entry for found in evaluate_rules([each], {"indexer[]": things})] == ["1"]
    assert evaluate_rules([some], {"indexer[]": things}) == []
    assert [found.current for found in evaluate_rules([some], {"indexer[]": things[:1]})] == [["One: False"]]
    assert len(evaluate_rules([some], {"indexer[]": []})) == 1  # none at all is not one that is so
    assert [found.entry for found in evaluate_rules([every], {"indexer[]": things})] == [""]
    assert evaluate_rules([each, some, every], {}) == []  # this version has no such area
    assert (
        evaluate_rules([each, some, every], {"indexer[]": [SettingsEntry("1", "One", {})]}) == []
    )  # nor such a setting


def test_conditions() -> None:
    here = rule(when={"setting": "enable", "equals": True})
    elsewhere = rule(when={"area": "customformat[]", "setting": "name", "matches": "(?i)repack"})
    off = SettingsEntry("1", "One", {"enableRss": False, "enable": False})
    assert evaluate_rules([here], {"indexer[]": [off]}) == []
    assert len(evaluate_rules([here], {"indexer[]": [SettingsEntry("1", "", {**off.values, "enable": True})]})) == 1
    assert evaluate_rules([elsewhere], {"indexer[]": [off], "customformat[]": []}) == []
    formats = [SettingsEntry("1", "", {"name": "Repack v2"})]
    assert len(evaluate_rules([elsewhere], {"indexer[]": [off], "customformat[]": formats})) == 1


@pytest.mark.parametrize(
    ("value", "whole"),
    [
        ("500M", True),
        (["exe", "bat"], True),
        (None, True),
        (0, True),
        ('"quotes" and 🎬', True),
        ("http://ada:secret@host", False),
        ("x" * 5000, False),
        ({"a": {"password": "geheim"}}, False),
        ([{"password": "geheim"}], False),
        (10**400, False),
        (["x"] * 100, False),
    ],
)
def test_values_are_kept_without_secrets_and_bounded(value: Any, whole: bool) -> None:
    kept, is_whole = to_storable(value)
    assert is_whole is whole
    assert (kept == value) is whole
    assert "geheim" not in str(kept)
    assert "secret" not in str(kept)
    assert len(json.dumps(kept)) < 5000


def test_a_rule_over_a_list_as_a_whole_sets_nothing() -> None:
    with pytest.raises(ValidationError, match="only rules about lists that are applied by hand"):
        rule(over="some", apply={"set": True})


def test_every_service_with_settings_has_rules() -> None:
    for name in {rule.service for rule in rules.load().rules}:
        connector = find_connector(name)
        assert connector.settings
        assert "configure" in connector.capabilities


def _allowed(document: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    reference = schema.get("$ref", "")
    return document["components"]["schemas"][reference.rpartition("/")[2]].get("enum", []) if reference else []
