"""Load the rules of audits: those that ship in configs/audit, and the user's own in the folder `audit.rules`.

A file is a list of rules. A user's rule with the id of another rule overrides fields of that rule. Invalid rules and
unreadable files are left out, and reported with file and line as problems of the audit.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from cluster.errors import ForgearrError
from cluster.services.capabilities.settings import is_list, is_secret
from cluster.services.catalog import find_connector
from cluster.settings import get_settings, home
from pipelines.media.audit.conditions import Condition, Expectation

Category = Literal["performance", "security", "best_practices"]
Priority = Literal["critical", "high", "medium", "low"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
SHIPPED_RULES = files("configs") / "audit"
MAX_FILE_CHARACTERS = 1_000_000
MAX_ALIASES = 100
MAX_DEPTH = 100
"""libyaml and our functions call themselves for each level; a deeper one would overflow the stack."""
MAX_VALUES = 100_000
"""Of a file, each alias counted as what it stands for. A few aliases of aliases stand for billions of values."""
YamlLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # twenty times as fast, if libyaml is installed


def _validate_url(text: str) -> str:
    if not text.startswith(("https://", "http://")):
        raise ValueError("a reference must be an address that begins with https:// or http://")
    return text


RuleText = Annotated[str, Field(min_length=1, max_length=2000)]


class Remedy(BaseModel):
    """How a rule is applied: by setting a value, or by hand if it needs a person's judgement."""

    model_config = ConfigDict(extra="forbid", strict=True)

    set: JsonValue = None
    by_hand: RuleText | None = Field(default=None, description="What a person has to do.")

    @model_validator(mode="after")
    def validate_exactly_one(self) -> Self:
        if len(self.model_fields_set) != 1 or (self.model_fields_set == {"by_hand"} and self.by_hand is None):
            raise ValueError("give one of set, by_hand")
        return self

    @property
    def is_by_hand(self) -> bool:
        return self.by_hand is not None


class Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,79}$")
    service: str = Field(description="The type of the service.")
    area: str = Field(description="The area of its settings. [] at the end marks a list of items.")
    setting: str = Field(min_length=1, max_length=200)
    over: Literal["each", "some", "all"] = Field(
        default="each",
        description="each: a finding for each item. some: one item must meet it. all: one finding for all items.",
    )
    where: dict[str, JsonValue] = Field(default_factory=dict, description="Only items with all these values.")
    when: Condition | None = Field(default=None, description="Only if this holds.")
    expect: Expectation
    recommended: JsonValue = Field(default=None, description="The value to show. Null: the one that is set.")
    apply: Remedy
    category: Category
    priority: Priority
    rationale: RuleText
    explanation: RuleText
    impact: RuleText
    references: list[Annotated[str, Field(max_length=500), AfterValidator(_validate_url)]] = Field(max_length=20)
    reference_setting: str | None = Field(default=None, description="A setting of the item with one more reference.")
    enabled: bool = True

    @model_validator(mode="after")
    def validate_rule(self) -> Self:
        try:
            connector = find_connector(self.service)
        except ForgearrError as error:
            raise ValueError(error.message) from None
        if connector.settings is None:
            raise ValueError(f"the settings of {connector.title} cannot be read")
        unknown = self.areas - connector.settings.names
        if unknown:
            known = ", ".join(sorted(connector.settings.names))
            raise ValueError(f"{connector.title} has no area '{min(unknown)}'; it has {known}")
        if not self.apply.is_by_hand and self.area not in connector.settings.writable:
            raise ValueError(f"'{self.area}' can only be changed by hand")
        if not self.apply.is_by_hand and is_secret(self.setting):
            raise ValueError("a secret can only be changed by hand")
        if self.over != "each" and (not is_list(self.area) or not self.apply.is_by_hand):
            raise ValueError("only rules about lists that are applied by hand may have over: some or all")
        self.service = connector.type
        return self

    @property
    def areas(self) -> set[str]:
        """The areas that must be read to evaluate the rule."""
        return {self.area} | self.expect.areas | (self.when.areas if self.when else set())

    @property
    def recommended_value(self) -> Any:
        """The recommended value, as it is shown to people."""
        if self.recommended is not None:
            return self.recommended
        return self.expect.equals if self.apply.is_by_hand else self.apply.set


@dataclass(frozen=True)
class RuleProblem:
    """An error in a file of rules."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclass(frozen=True)
class RuleSet:
    rules: list[Rule]
    problems: list[RuleProblem]


def user_folder() -> Path:
    """The folder of the user's own rules."""
    return get_settings().audit.rules or home() / "audit"


def load() -> RuleSet:
    """Load all enabled rules, and the errors of the others."""
    problems: list[RuleProblem] = []
    rules_by_id: dict[str, tuple[dict[str, Any], _RuleSource]] = {}
    shipped_files = sorted(SHIPPED_RULES.iterdir(), key=lambda file: file.name)
    user_files = sorted(user_folder().glob("*.y*ml"))
    for name, path in [(f"configs/audit/{file.name}", file) for file in shipped_files] + [
        (str(path), path) for path in user_files
    ]:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            # Without the path that an OSError adds.
            reason = error.strerror if isinstance(error, OSError) else error
            problems.append(RuleProblem(name, 1, f"It cannot be read: {reason}."))
            continue
        for values, source in _parse(name, text, problems):
            _merge_rule(rules_by_id, values, source, problems)
    rules: list[Rule] = []
    for values, source in rules_by_id.values():
        try:
            rules.append(Rule.model_validate(values))
        except ValidationError as error:
            problems.append(_to_problem(error, source))
    return RuleSet([rule for rule in rules if rule.enabled], problems)


@dataclass(frozen=True)
class _RuleSource:
    file: str
    node: yaml.MappingNode

    def line(self, *names: int | str) -> int:
        """The line of a field, or of the innermost enclosing field that this file has."""
        node: yaml.Node = self.node
        line = node.start_mark.line
        for name in names:
            if not isinstance(node, yaml.MappingNode):
                break
            pairs: list[tuple[yaml.Node, yaml.Node]] = node.value
            found = next(((key, value) for key, value in pairs if key.value == name), None)
            if found is None:
                break
            line, node = found[0].start_mark.line, found[1]
        return line + 1


def _parse(file: str, text: str, problems: list[RuleProblem]) -> Iterator[tuple[dict[str, Any], _RuleSource]]:
    """The rules of a file as they are written, each with its source."""
    if len(text) > MAX_FILE_CHARACTERS:
        problems.append(RuleProblem(file, 1, f"A file of rules may have at most {MAX_FILE_CHARACTERS} characters."))
        return
    loader = YamlLoader(text)
    try:
        if excess := _find_excess(text):
            problems.append(RuleProblem(file, 1, f"A file of rules may have at most {excess}."))
            return
        root = loader.get_single_node()
        if root is None:
            return
        if _count_values(root, {}) > MAX_VALUES:
            problems.append(RuleProblem(file, 1, f"A file of rules may have at most {MAX_VALUES:,} values."))
            return
        if not isinstance(root, yaml.SequenceNode):
            problems.append(RuleProblem(file, root.start_mark.line + 1, "A file of rules must be a list of rules."))
            return
        for node in root.value:
            values = loader.construct_document(node)
            if isinstance(values, dict) and isinstance(node, yaml.MappingNode) and isinstance(values.get("id"), str):
                yield values, _RuleSource(file, node)
            else:
                problems.append(RuleProblem(file, node.start_mark.line + 1, "A rule must be a mapping with an id."))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or "it is not YAML"
        problems.append(RuleProblem(file, mark.line + 1 if mark else 1, f"It cannot be read: {reason}."))
    finally:
        loader.dispose()


def _find_excess(text: str) -> str | None:
    """What a file has too much of, found before it is composed."""
    aliases = depth = 0
    for event in yaml.parse(text, Loader=YamlLoader):
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if aliases > MAX_ALIASES:
            return f"{MAX_ALIASES} aliases"
        if depth > MAX_DEPTH:
            return f"{MAX_DEPTH} levels"
    return None


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """The number of values of a node once its aliases are replaced. `counts` has those of the nodes before it."""
    if id(node) in counts:
        return counts[id(node)]
    counts[id(node)] = MAX_VALUES + 1  # of an alias inside of what it stands for
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[id(node)]


def _merge_rule(
    rules_by_id: dict[str, tuple[dict[str, Any], _RuleSource]],
    values: dict[str, Any],
    source: _RuleSource,
    problems: list[RuleProblem],
) -> None:
    existing = rules_by_id.get(values["id"])
    if existing is None:
        rules_by_id[values["id"]] = values, source
        return
    merged = {**existing[0], **values}
    try:
        Rule.model_validate(merged)
    except ValidationError as error:
        problems.append(_to_problem(error, source))  # the existing rule stays unchanged
        return
    rules_by_id[values["id"]] = merged, source


def _to_problem(error: ValidationError, source: _RuleSource) -> RuleProblem:
    first_error = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(map(str, first_error["loc"]))
    message = first_error["msg"].removeprefix("Value error, ").rstrip(".")
    return RuleProblem(
        source.file, source.line(*first_error["loc"]), f"{field}: {message}." if field else f"{message}."
    )
