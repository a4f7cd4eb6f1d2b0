"""What a model brings along, put into the requests that do not say it themselves: one place for all doors."""

from collections.abc import Mapping
from typing import Any

from pipelines.training.models.versions import Manner
from serve.engines.messages import Message, conversation
from serve.engines.options import Parameters


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
