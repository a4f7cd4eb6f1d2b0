"""What a model brings along, put into the requests that do not say it themselves: one place for all doors."""

from collections.abc import Mapping
from typing import Any

from pipelines.training.models.versions import ModelDefaults
from serve.engines.messages import Message, to_openai_messages
from serve.engines.options import Parameters


def apply_defaults(request: Mapping[str, Any], defaults: ModelDefaults) -> Mapping[str, Any]:
    """The same request, with the model's own parameters, system message and first messages where it has none."""
    if defaults.parameters:
        request = {**Parameters.model_validate(defaults.parameters).for_engine(), **request}
    if "messages" in request and (defaults.system or defaults.messages):
        messages: list[dict[str, Any]] = list(request["messages"])
        system = [{"role": "system", "content": defaults.system}] if defaults.system else []
        if messages and messages[0]["role"] == "system":
            system, messages = messages[:1], messages[1:]
        first = to_openai_messages([Message.model_validate(message) for message in defaults.messages])
        request = {**request, "messages": [*system, *first, *messages]}
    return request


def context_limit(defaults: ModelDefaults) -> int | None:
    """How many tokens a conversation may have by the model's own parameters."""
    return defaults.parameters.get("num_ctx")
