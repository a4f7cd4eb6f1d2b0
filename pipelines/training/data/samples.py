"""What a model learns from: conversations, and preferred beside rejected answers. A dataset has one of them per line.

A line of chat is `{"messages": […], "tools": […]}` in the form of OpenAI's API; one that was made from a repository
also says where it is from. A line of preferences is `{"messages", "tools", "chosen", "rejected"}`; it may also be told
as OpenAI does (`input`, `preferred_output`, `non_preferred_output`) or as `{"prompt", "chosen", "rejected"}`.
"""

from typing import Self

from pydantic import Field, model_validator

from pipelines.training.data.messages import Message, SamplePart, Tool, validate_conversation


class Source(SamplePart):
    """Where in a repository a sample is from. It is not learned."""

    kind: str | None = Field(default=None, max_length=40, description="What sort of question it is.")
    path: str | None = Field(default=None, max_length=4096)
    lines: list[int] | None = Field(default=None, min_length=2, max_length=2, description="First and last, from 1.")
    commit: str | None = Field(default=None, max_length=64)


class Sample(SamplePart):
    """A conversation that ends with what the assistant should say."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    source: Source | None = None

    @model_validator(mode="after")
    def validate_messages(self) -> Self:
        self.tools = self.tools or None
        validate_conversation(self.messages, self.tools)
        return self


class PreferencePair(SamplePart):
    """A conversation up to an answer, with a better and a worse one."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    chosen: list[Message] = Field(min_length=1)
    rejected: list[Message] = Field(min_length=1)

    @model_validator(mode="after")
    def validate_messages(self) -> Self:
        self.tools = self.tools or None
        for answer in (self.chosen, self.rejected):
            if answer[0].role != "assistant":
                raise ValueError(
                    "chosen and rejected begin with the assistant's answer; what comes before is in messages"
                )
            validate_conversation([*self.messages, *answer], self.tools)
        if self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same, so there is nothing to prefer")
        return self
