"""What audits know: the rules that ship in configs/audit, and those of the folder `audit.rules`.

A file is a list of rules. One of a user's with the id of another changes that one: what it says itself wins. A rule
that cannot be is left out, and so is a file that cannot be read; who audits is told of both, with file and line.
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
SHIPPED = files("configs") / "audit"
FILE_MAX = 1_000_000
ALIASES_MAX = 100
YamlLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # twenty times as fast, where there is libyaml


def _one_address(text: str) -> str:
    if not text.startswith(("https://", "http://")):
        raise ValueError("a reference is an address that begins with https://")
    return text


Words = Annotated[str, Field(min_length=1, max_length=2000)]


class Remedy(BaseModel):
    """How a rule is applied: by setting something, or by hand where that needs somebody's judgement."""

    model_config = ConfigDict(extra="forbid", strict=True)

    set: JsonValue = None
    by_hand: Words | None = Field(default=None, description="What a person has to do.")

    @model_validator(mode="after")
    def say_one(self) -> Self:
        if len(self.model_fields_set) != 1 or (self.model_fields_set == {"by_hand"} and self.by_hand is None):
            raise ValueError("say one of set, by_hand")
        return self

    @property
    def is_by_hand(self) -> bool:
        return self.by_hand is not None


class Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,79}$")
    service: str = Field(description="The type of service that it is about.")
    area: str = Field(description="Where in its settings; [] at its end: a list of things.")
    setting: str = Field(min_length=1, max_length=200)
    over: Literal["each", "some", "all"] = Field(
        default="each",
        description="each: a finding for each thing of a list. some: one must be so. all: one finding.",
    )
    where: dict[str, JsonValue] = Field(default_factory=dict, description="Only things of which all this is so.")
    when: Condition | None = Field(default=None, description="Only if this holds.")
    expect: Expectation
    recommended: JsonValue = Field(default=None, description="What to show as the better value. Not sent: what is set.")
    apply: Remedy
    category: Category
    priority: Priority
    rationale: Words
    explanation: Words
    impact: Words
    references: list[Annotated[str, Field(max_length=500), AfterValidator(_one_address)]] = Field(max_length=20)
    reference_setting: str | None = Field(default=None, description="A setting of the thing that holds another one.")
    enabled: bool = True

    @model_validator(mode="after")
    def be_possible(self) -> Self:
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
            raise ValueError("only rules about lists that are applied by hand can be over some or all of their things")
        self.service = connector.type
        return self

    @property
    def areas(self) -> set[str]:
        """What has to be read to know."""
        return {self.area} | self.expect.areas | (self.when.areas if self.when else set())

    @property
    def better(self) -> Any:
        """The value that is recommended, to show to people."""
        if self.recommended is not None:
            return self.recommended
        return self.expect.equals if self.apply.is_by_hand else self.apply.set


@dataclass(frozen=True)
class Problem:
    """Something in a file of rules that cannot be."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclass(frozen=True)
class Rules:
    rules: list[Rule]
    problems: list[Problem]


def folder() -> Path:
    """Where users keep their own."""
    return get_settings().audit.rules or home() / "audit"


def load() -> Rules:
    """All rules that are enabled, and what is wrong with others."""
    problems: list[Problem] = []
    said: dict[str, tuple[dict[str, Any], _Place]] = {}
    shipped = sorted(SHIPPED.iterdir(), key=lambda file: file.name)
    own = sorted(folder().glob("*.y*ml"))
    for name, path in [(f"configs/audit/{file.name}", file) for file in shipped] + [(str(path), path) for path in own]:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(Problem(name, 1, f"It cannot be read: {error}."))
            continue
        for values, place in _parse(name, text, problems):
            _take(said, values, place, problems)
    rules: list[Rule] = []
    for values, place in said.values():
        try:
            rules.append(Rule.model_validate(values))
        except ValidationError as error:
            problems.append(_problem(error, place))
    return Rules([rule for rule in rules if rule.enabled], problems)


@dataclass(frozen=True)
class _Place:
    file: str
    node: yaml.MappingNode

    def line(self, *names: int | str) -> int:
        """Where that field stands, as far as it is written down here."""
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


def _parse(file: str, text: str, problems: list[Problem]) -> Iterator[tuple[dict[str, Any], _Place]]:
    """The rules of a file as they are written, each with its place."""
    if len(text) > FILE_MAX:
        problems.append(Problem(file, 1, f"A file of rules has {FILE_MAX} characters at most."))
        return
    loader = YamlLoader(text)
    try:
        if sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=YamlLoader)) > ALIASES_MAX:
            problems.append(Problem(file, 1, f"A file of rules has {ALIASES_MAX} aliases at most."))
            return
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.SequenceNode):
            problems.append(Problem(file, root.start_mark.line + 1, "A file of rules is a list of them."))
            return
        for node in root.value:
            values = loader.construct_document(node)
            if isinstance(values, dict) and isinstance(node, yaml.MappingNode) and isinstance(values.get("id"), str):
                yield values, _Place(file, node)
            else:
                problems.append(Problem(file, node.start_mark.line + 1, "A rule has an id, and what it says."))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or "it is not YAML"
        problems.append(Problem(file, mark.line + 1 if mark else 1, f"It cannot be read: {reason}."))
    finally:
        loader.dispose()


def _take(
    said: dict[str, tuple[dict[str, Any], _Place]], values: dict[str, Any], place: _Place, problems: list[Problem]
) -> None:
    known = said.get(values["id"])
    if known is None:
        said[values["id"]] = values, place
        return
    merged = {**known[0], **values}
    try:
        Rule.model_validate(merged)
    except ValidationError as error:
        problems.append(_problem(error, place))  # the one that is changed stays as it was
        return
    said[values["id"]] = merged, place


def _problem(error: ValidationError, place: _Place) -> Problem:
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, fault["loc"]))
    message = fault["msg"].removeprefix("Value error, ").rstrip(".")
    return Problem(place.file, place.line(*fault["loc"]), f"{where}: {message}." if where else f"{message}.")
