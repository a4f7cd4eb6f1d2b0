"""Formats the defaults of a model as Ollama shows them: as a list of parameters, and as a Modelfile."""

from collections.abc import Mapping
from typing import Any

from pipelines.training.models.versions import ModelDefaults

COLUMN_WIDTH = 30


def format_parameters(parameters: Mapping[str, Any]) -> str:
    """One line for each parameter, or for each element of a list."""
    lines = [
        f"{name:<{COLUMN_WIDTH}} {_format_value(item)}"
        for name, value in parameters.items()
        for item in (value if isinstance(value, list) else [value])
    ]
    return "\n".join(lines)


def modelfile(reference: str, template: str, defaults: ModelDefaults) -> str:
    """The Modelfile from which Ollama would create this model."""
    lines = [f"FROM {reference}", f'TEMPLATE """{template}"""']
    if defaults.system:
        lines.append(f'SYSTEM """{defaults.system}"""')
    lines += [
        f"PARAMETER {name} {_format_value(item)}"
        for name, value in defaults.parameters.items()
        for item in (value if isinstance(value, list) else [value])
    ]
    lines += [f'MESSAGE {item["role"]} """{item.get("content", "")}"""' for item in defaults.messages]
    lines += [f'LICENSE """{text}"""' for text in defaults.license]
    return "\n".join(lines) + "\n"


def _format_value(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
