"""A model's defaults as a Modelfile."""

from collections.abc import Mapping
from typing import Any

from pipelines.training.models.versions import Manner

COLUMN = 30


def as_text(parameters: Mapping[str, Any]) -> str:
    """As Ollama shows them: a line each, and one for each of several stops."""
    lines = [
        f"{name:<{COLUMN}} {_shown(one)}"
        for name, value in parameters.items()
        for one in (value if isinstance(value, list) else [value])
    ]
    return "\n".join(lines)


def modelfile(reference: str, template: str, manner: Manner) -> str:
    """As one would write it for Ollama to make this model."""
    lines = [f"FROM {reference}", f'TEMPLATE """{template}"""']
    if manner.system:
        lines.append(f'SYSTEM """{manner.system}"""')
    lines += [
        f"PARAMETER {name} {_shown(one)}"
        for name, value in manner.parameters.items()
        for one in (value if isinstance(value, list) else [value])
    ]
    lines += [f'MESSAGE {one["role"]} """{one.get("content", "")}"""' for one in manner.messages]
    lines += [f'LICENSE """{text}"""' for text in manner.license]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
