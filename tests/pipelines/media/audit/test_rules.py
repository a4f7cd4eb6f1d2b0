"""The rules of audits: the shipped rules, checked against the services' documents, and users' own rules."""

import json
from itertools import pairwise
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
BOMB = f"  where:\n    a: &a [{', '.join('xxxxxxxxx')}]\n" + "".join(
    f"    {name}: &{name} [{', '.join([f'*{previous}'] * 9)}]\n" for previous, name in pairwise("abcdefghij")
)
"""81 aliases that stand for 4 billion values."""
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
"""As servers return them at `/:/prefs`, some capitalized and some not. Plex does not document them."""
PROWLARR = {
    "applications[]": {"syncLevel"},
    "indexer[]": {"protocol", "enable", "fields.baseSettings.queryLimit", "fields.baseSettings.grabLimit"},
    "health[]": {"message", "wikiUrl"},
}
"""Copied by hand from its official document (`ApplicationResource`, `IndexerResource`, `HealthResource`), which leaves
the names of fields open. Those two are in its sources (`IndexerBaseSettings`)."""


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


def test_the_shipped_rules_cover_five_services_and_are_valid() -> None:
    known = rules.load()
    assert known.problems == []
    assert len(known.rules) >= 100
    assert {rule.service for rule in known.rules} == {"sonarr", "radarr", "sabnzbd", "prowlarr", "plex"}
    assert len({rule.id for rule in known.rules}) == len(known.rules)
    for rule in known.rules:
        assert rule.recommended_value is not None, rule.id
        # The value that is set must meet the expectation, or applying the rule would not resolve the finding.
        if not rule.apply.is_by_hand:
            assert rule.expect.holds(rule.apply.set, SettingsEntry("", "", {}), {}), rule.id


@pytest.mark.parametrize("service", ["sonarr", "radarr"])
def test_the_official_documents_have_every_setting(service: str) -> None:
    document = json.loads(document_path(service).read_text())
    settings = {setting for rule in shipped(service) for setting in settings_of(rule)}
    assert len(settings) > 25
    for area, setting in sorted(settings):
        content = document["paths"][f"/api/v3/{area.removesuffix('[]')}"]["get"]["responses"]["200"]["content"]
        schema = next(iter(content.values()))["schema"]
        reference = schema["items"]["$ref"] if area.endswith("[]") else schema["$ref"]
        properties = document["components"]["schemas"][reference.rpartition("/")[2]]["properties"]
        assert setting.partition(".")[0] in properties, (area, setting)
        allowed = _allowed(document, properties.get(setting, {}))
        for rule in shipped(service):
            if allowed and (rule.area, rule.setting) == (area, setting):
                expected = [rule.expect.equals, *(rule.expect.one_of or [])]
                assert [value for value in expected if value is not None and value not in allowed] == [], rule.id


def test_plex_and_prowlarr_have_every_setting() -> None:
    for rule in shipped("plex"):
        assert {setting for _, setting in settings_of(rule)} <= PLEX_PREFERENCES
    for rule in shipped("prowlarr"):
        assert all(setting in PROWLARR[area] for area, setting in settings_of(rule)), rule.id


def test_users_can_add_change_and_disable_rules(write: Any) -> None:
    before = rules.load().rules
    write(RULE + "\n- {id: sabnzbd.pre-check, enabled: false}\n- {id: sonarr.hardlinks, priority: low}\n")
    known = rules.load()
    assert known.problems == []
    by_id = {rule.id: rule for rule in known.rules}
    assert by_id.keys() == {rule.id for rule in before} - {"sabnzbd.pre-check"} | {"mine.cache"}
    assert by_id["sonarr.hardlinks"].priority == "low"
    assert by_id["sonarr.hardlinks"].setting == "copyUsingHardlinks"


@pytest.mark.parametrize(
    ("text", "line", "message"),
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
        (RULE.replace("mine.cache", "mine.bomb") + BOMB, 1, "at most 100,000 values"),
        (RULE.replace("mine.cache", "mine.bomb") + "  when: &a {b: *a}\n", 1, "at most 100,000 values"),
        ("- " * 100_000 + "x\n", 1, "at most 100 levels"),
    ],
)
def test_an_invalid_rule_is_reported_by_file_and_line_and_others_are_loaded(
    write: Any, text: str, line: int, message: str
) -> None:
    shipped_ids = {rule.id for rule in rules.load().rules}
    file = write(text)
    write(RULE.replace("mine.cache", "mine.other"), "other.yaml")
    known = rules.load()
    problem = known.problems[0]
    assert (problem.file, problem.line) == (file, line), problem
    assert message in problem.message
    assert str(problem).startswith(f"{file}:{line}: ")
    assert {rule.id for rule in known.rules} == shipped_ids | {"mine.other"}


@pytest.mark.parametrize(
    ("values", "met", "unmet"),
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
def test_an_expectation_holds_for_the_right_values(values: dict[str, Any], met: list[Any], unmet: list[Any]) -> None:
    expectation = Expectation.model_validate(values)
    entry = SettingsEntry("", "", {"other": "a"})
    assert [expectation.holds(value, entry, {}) for value in met] == [True] * len(met)
    assert [expectation.holds(value, entry, {}) for value in unmet] == [False] * len(unmet)


def test_a_folder_is_inside_another_only_by_whole_path_segments() -> None:
    expectation = Expectation.model_validate({"outside": {"area": "rootfolder[]", "setting": "path"}})
    settings = {"rootfolder[]": [SettingsEntry("1", "/tv", {"path": "/tv/"}), SettingsEntry("2", "", {"path": None})]}
    assert expectation.holds("/tv2/x", SettingsEntry("", "", {}), settings)
    assert not expectation.holds("/tv", SettingsEntry("", "", {}), settings)
    assert not expectation.holds("/tv/x", SettingsEntry("", "", {}), settings)


def rule(**values: Any) -> Rule:
    defaults = {
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
    return Rule.model_validate({**defaults, **values})


def test_lists_are_evaluated_per_entry_or_as_a_whole() -> None:
    entries = [SettingsEntry("1", "One", {"enableRss": False}), SettingsEntry("2", "Two", {"enableRss": True})]
    each, some, every = rule(), rule(over="some"), rule(over="all")
    assert [finding.entry for finding in evaluate_rules([each], {"indexer[]": entries})] == ["1"]
    assert evaluate_rules([some], {"indexer[]": entries}) == []
    assert [finding.current for finding in evaluate_rules([some], {"indexer[]": entries[:1]})] == [["One: False"]]
    assert len(evaluate_rules([some], {"indexer[]": []})) == 1  # an empty list has no entry that meets it
    assert [finding.entry for finding in evaluate_rules([every], {"indexer[]": entries})] == [""]
    # A version of the service may lack the area or the setting.
    assert evaluate_rules([each, some, every], {}) == []
    assert evaluate_rules([each, some, every], {"indexer[]": [SettingsEntry("1", "One", {})]}) == []


def test_a_rule_applies_only_if_its_condition_holds() -> None:
    same_entry = rule(when={"setting": "enable", "equals": True})
    other_area = rule(when={"area": "customformat[]", "setting": "name", "matches": "(?i)repack"})
    off = SettingsEntry("1", "One", {"enableRss": False, "enable": False})
    assert evaluate_rules([same_entry], {"indexer[]": [off]}) == []
    assert (
        len(evaluate_rules([same_entry], {"indexer[]": [SettingsEntry("1", "", {**off.values, "enable": True})]})) == 1
    )
    assert evaluate_rules([other_area], {"indexer[]": [off], "customformat[]": []}) == []
    formats = [SettingsEntry("1", "", {"name": "Repack v2"})]
    assert len(evaluate_rules([other_area], {"indexer[]": [off], "customformat[]": formats})) == 1


@pytest.mark.parametrize(
    ("value", "is_complete"),
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
def test_stored_values_have_no_secrets_and_a_limited_size(value: Any, is_complete: bool) -> None:
    stored, complete = to_storable(value)
    assert complete is is_complete
    assert (stored == value) is is_complete
    assert "geheim" not in str(stored)
    assert "secret" not in str(stored)
    assert len(json.dumps(stored)) < 5000


def test_a_rule_over_a_whole_list_can_only_be_applied_by_hand() -> None:
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
