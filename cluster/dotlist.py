"""Values as people type them after --set: `key=value`, with a dot for each step into what is nested."""

from typing import Any, cast

import yaml

from cluster.errors import InvalidRequest


def assign(target: dict[str, Any], assignment: str) -> None:
    """Set one value, which is read as YAML."""
    path, equals, text = assignment.partition("=")
    *sections, name = path.split(".")
    if not equals or not name:
        raise InvalidRequest(f"--set takes key=value, not '{assignment}'.")
    for section in sections:
        inner: Any = target.setdefault(section, {})
        if not isinstance(inner, dict):
            raise InvalidRequest(f"--set {path} does not fit: {section} is {inner!r}, which has nothing inside.")
        target = cast(dict[str, Any], inner)
    try:
        target[name] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidRequest(f"The value of {path} cannot be read: {' '.join(str(error).split())}.") from error
