"""A function that the tests of audit rules share."""

from pipelines.media.audit.conditions import Condition
from pipelines.media.audit.rules import Rule


def settings_of(rule: Rule) -> set[tuple[str, str]]:
    """Every setting that a rule names, with its area."""
    named = {(rule.area, rule.setting)} | {(rule.area, name) for name in rule.where}
    if rule.reference_setting:
        named.add((rule.area, rule.reference_setting))
    for expectation, area in ((rule.expect, rule.area), (rule.when, (rule.when and rule.when.area) or rule.area)):
        if expectation is None:
            continue
        if expectation.different_from:
            named.add((area, expectation.different_from))
        if expectation.outside:
            named.add((expectation.outside.area, expectation.outside.setting))
        if isinstance(expectation, Condition):
            named.add((area, expectation.setting))
    return named
