"""Applies a model's own defaults to requests: parameters, system message and first messages, alike for all APIs."""

from collections.abc import Mapping
from typing import Any

from pipelines.training.models.versions import ModelDefaults
from serve.engines.messages import Message, to_openai_messages
from serve.engines.options import Parameters


def apply_defaults(request: Mapping[str, Any], defaults: ModelDefaults) -> Mapping[str, Any]:
    """Add the model's parameters, system message and first messages where the request sets none."""
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
    """The size of the context in tokens that the model's own parameters set; None if they set none."""
    return defaults.parameters.get("num_ctx")
