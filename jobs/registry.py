"""The registry of the kinds of job: their declaration, and the validation of specs and resources.

A module that is named in `jobs.modules` declares its kinds with the decorator `job`. It must be light to import (heavy
libraries are imported inside the function), because the gateway imports it to check specs. The dispatcher needs only
the row of a job; workers import the function by its path.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.errors import Forbidden, NotFound, UnprocessableRequest
from cluster.ownership import Principal
from cluster.settings import get_settings

MAX_SPEC_BYTES = 1_000_000
MAX_FAULTS = 1000
"""An error names the invalid fields of a spec up to this number of them."""
MIN_FRACTION = 0.0001
MAX_DEMAND_LENGTH = 300

Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_./-]{0,62}$")]


class UnknownKind(NotFound):
    """There is no such kind of job."""

    code = "JOB_KIND_NOT_FOUND"


class InvalidSpec(UnprocessableRequest):
    """The spec is not valid for this kind of job."""

    code = "INVALID_JOB_SPEC"


class Resources(BaseModel):
    """The resources that a job occupies while it runs. A job without any is light: it shares a warm worker."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    cpus: float = Field(default=0, ge=0, le=100_000)
    gpus: float = Field(default=0, ge=0, le=10_000, description="A fraction of one GPU, or a whole number.")
    memory_mb: int = Field(default=0, ge=0, le=1_000_000_000)
    labels: dict[Label, Label] = Field(default_factory=dict, description="Labels that the node must have.")
    workers: int = Field(
        default=1,
        ge=1,
        le=10_000,
        description="Number of workers, on any nodes, each with these resources. Above 1, the job itself starts them.",
    )

    @model_validator(mode="after")
    def validate_for_ray(self) -> Self:
        """Refuse here what Ray would refuse, before it reaches the dispatcher."""
        if 0 < self.cpus < MIN_FRACTION or 0 < self.gpus < MIN_FRACTION:
            raise ValueError(f"cpus and gpus must be 0, or at least {MIN_FRACTION}")
        if self.gpus > 1 and self.gpus % 1:
            raise ValueError("gpus above 1 must be a whole number")
        if len(self.demand) > MAX_DEMAND_LENGTH:
            raise ValueError(f"all labels together must have at most {MAX_DEMAND_LENGTH} characters")
        return self

    @property
    def demand(self) -> str:
        """The resources as one text, to compare and to show. Empty for a light job."""
        parts = [f"{self.cpus:g} CPU"] if self.cpus else []
        parts += [f"{self.gpus:g} GPU"] if self.gpus else []
        parts += [f"{self.memory_mb} MB memory"] if self.memory_mb else []
        parts += [f"{name}={value}" for name, value in sorted(self.labels.items())]
        per_worker = ", ".join(parts)
        return f"{self.workers} times {per_worker}" if per_worker and self.workers > 1 else per_worker


LIGHT = Resources()


@dataclass(frozen=True)
class Kind:
    name: str
    entrypoint: str
    spec: type[BaseModel]
    description: str
    resources: Resources | Callable[[Any], Resources] = LIGHT  # may depend on the spec
    max_attempts: int = 3
    time_limit: float | None = None  # seconds that an attempt may take
    stall_limit: float | None = None  # seconds without a report, checkpoint or log
    concurrency: int | None = None  # how many may run at the same time
    tracked: bool = False  # whether jobs are recorded in MLflow
    admin_only: bool | Callable[[Any], str | None] = False  # or a function: what in this spec only they may choose
    routine: bool = False  # it runs all day long and leaves nothing: one that succeeded is deleted soon

    def validate_spec(self, spec: object) -> dict[str, Any]:
        """Validate a spec, and return it as JSON, with its defaults."""
        try:
            checked = self.spec.model_validate(spec).model_dump(mode="json")
        except ValidationError as error:
            if error.error_count() > MAX_FAULTS:
                raise InvalidSpec(
                    f"The spec of '{self.name}' has {error.error_count():,} fields that are not valid."
                ) from None
            faults = {_field_path(fault["loc"]): fault["msg"] for fault in error.errors(include_url=False)}
            field, fault = next(iter(faults.items()))
            raise InvalidSpec(f"The spec of '{self.name}' is not valid: {field}: {fault}.", details=faults) from None
        # A page of jobs contains a hundred specs.
        if len(json.dumps(checked)) > MAX_SPEC_BYTES:
            raise InvalidSpec(f"A spec must have at most {MAX_SPEC_BYTES} bytes.")
        self.resources_for(checked)
        return checked

    def resources_for(self, spec: Mapping[str, Any]) -> Resources:
        """Return the resources of a job with this validated spec."""
        if isinstance(self.resources, Resources):
            return self.resources
        try:
            return self.resources(self.spec.model_validate(spec))
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            reason = ": ".join([*map(str, fault["loc"]), fault["msg"].removeprefix("Value error, ")])
            raise InvalidSpec(f"The spec of '{self.name}' requires invalid resources: {reason}.") from None

    def require_permitted(self, spec: Mapping[str, Any], principal: Principal) -> None:
        """Raise Forbidden if only an administrator may run this kind, or run it with this validated spec."""
        if principal.is_admin or self.admin_only is False:
            return
        choice = None if self.admin_only is True else self.admin_only(self.spec.model_validate(spec))
        if self.admin_only is True or choice is not None:
            condition = f" with {choice}" if choice else ""
            raise Forbidden(f"Only an administrator may run '{self.name}'{condition}.")


Function = TypeVar("Function", bound=Callable[..., Any])

_kinds: dict[str, Kind] = {}
_loaded: set[str] = set()


def job(name: str, *, spec: type[BaseModel], **options: Any) -> Callable[[Function], Function]:
    """Decorator: declare a function as the kind `name`. The first line of its docstring describes the kind."""

    def declare(function: Function) -> Function:
        description = (function.__doc__ or "").strip().partition("\n")[0]
        entrypoint = f"{function.__module__}:{function.__qualname__}"
        _kinds[name] = Kind(name, entrypoint, spec, description, **options)
        return function

    return declare


def kinds() -> dict[str, Kind]:
    """Return all kinds by name. Modules of `jobs.modules` are imported if they are not yet."""
    for module in get_settings().jobs.modules:
        if module not in _loaded:
            import_module(module)
            _loaded.add(module)
    return _kinds


def find_kind(name: str) -> Kind:
    known = kinds()
    if name not in known:
        raise UnknownKind(f"There is no kind of job named '{name}'. There are: {', '.join(sorted(known))}.")
    return known[name]


def load_function(entrypoint: str) -> Callable[..., Any]:
    module, _, function = entrypoint.partition(":")
    return getattr(import_module(module), function)


def _field_path(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "spec"
