"""What a model brings along, put into the requests that do not say it themselves: one place for all doors."""

from collections.abc import Mapping
from typing import Any

from pipelines.training.registry import Manner
from serve.bodies.ollama import Message, conversation
from serve.bodies.ollama_models import Parameters

COLUMN = 30


def applied(request: Mapping[str, Any], manner: Manner) -> Mapping[str, Any]:
    """The same request, with the model's own parameters, system message and first messages where it has none."""
    if manner.parameters:
        request = {**Parameters.model_validate(manner.parameters).for_engine(), **request}
    if "messages" in request and (manner.system or manner.messages):
        said: list[dict[str, Any]] = list(request["messages"])
        system = [{"role": "system", "content": manner.system}] if manner.system else []
        if said and said[0]["role"] == "system":
            system, said = said[:1], said[1:]
        first = conversation([Message.model_validate(one) for one in manner.messages])
        request = {**request, "messages": [*system, *first, *said]}
    return request


def context_of(manner: Manner) -> int | None:
    """How many tokens a conversation may have by the model's own parameters."""
    return manner.parameters.get("num_ctx")


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
