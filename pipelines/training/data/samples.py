"""The schema of samples: conversations, and pairs of a preferred and a rejected answer. A dataset has one per line.

A line of chat is `{"messages": […], "tools": […]}`, as in OpenAI's API. A line made from a repository also has its
source. A line of preferences is `{"messages", "tools", "chosen", "rejected"}`. OpenAI's format (`input`,
`preferred_output`, `non_preferred_output`) and `{"prompt", "chosen", "rejected"}` are converted to it.
"""

from typing import Self

from pydantic import Field, model_validator

from pipelines.training.data.messages import Message, SamplePart, Tool, validate_conversation


class Source(SamplePart):
    """Where in a repository a sample comes from. It is not part of the training text."""

    kind: str | None = Field(default=None, max_length=40, description="The kind of question.")
    path: str | None = Field(default=None, max_length=4096)
    lines: list[int] | None = Field(default=None, min_length=2, max_length=2, description="First and last, from 1.")
    commit: str | None = Field(default=None, max_length=64)


class Sample(SamplePart):
    """A conversation that ends with the answer that the assistant should give."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    source: Source | None = None

    @model_validator(mode="after")
    def validate_messages(self) -> Self:
        self.tools = self.tools or None
        validate_conversation(self.messages, self.tools)
        return self


class PreferencePair(SamplePart):
    """A conversation, and a preferred and a rejected answer to it."""

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
                    "chosen and rejected must begin with the assistant's answer; earlier messages belong in messages"
                )
            validate_conversation([*self.messages, *answer], self.tools)
        if self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same, so there is nothing to prefer")
        return self
