"""Parse the values of the option --set: `key=value`, where dots in the key separate nested names."""

from typing import Any, cast

import yaml

from cluster.errors import InvalidRequest


def assign(target: dict[str, Any], assignment: str) -> None:
    """Set one value in `target`. The value is parsed as YAML."""
    path, equals, text = assignment.partition("=")
    *sections, name = path.split(".")
    if not equals or not name:
        raise InvalidRequest(f"--set takes key=value, not '{assignment}'.")
    for section in sections:
        inner: Any = target.setdefault(section, {})
        if not isinstance(inner, dict):
            raise InvalidRequest(f"--set {path} is not possible: {section} is {inner!r}, not a mapping.")
        target = cast(dict[str, Any], inner)
    try:
        target[name] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidRequest(f"The value of {path} is not valid YAML: {' '.join(str(error).split())}.") from error
