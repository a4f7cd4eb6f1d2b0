"""The requests of the routes that create, copy, pull and delete models."""

from typing import Annotated, Any, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from pipelines.training.models.versions import ModelDefaults
from serve.engines.messages import Message
from serve.engines.options import Parameters
from serve.openai.chat_schemas import ModelReference

Digest = Annotated[str, Field(pattern=r"^sha256[:-][0-9a-f]{64}$", examples=[f"sha256:{'0' * 64}"])]
Blobs = Annotated[dict[Annotated[str, Field(min_length=1, max_length=200)], Digest], Field(min_length=1)]
MAX_TEXT_LENGTH = 90_000
"""For all texts of a model together, because MLflow stores them in one tag."""


class NamedRequest(BaseModel):
    """Older clients send `name` instead of `model`."""

    model_config = ConfigDict(extra="forbid")

    model: ModelReference = Field(validation_alias=AliasChoices("model", "name"))


class StreamedRequest(NamedRequest):
    stream: bool | None = Field(default=None, description="Null: true.")

    @property
    def is_streamed(self) -> bool:
        return self.stream is not False


class DeleteRequest(NamedRequest):
    pass


class CopyRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    source: ModelReference
    destination: ModelReference


class PullRequest(StreamedRequest):
    insecure: bool | None = Field(default=None, description="Passed on to the Ollama server.")


class PushRequest(StreamedRequest):
    insecure: bool | None = Field(default=None, description="Not used.")


class CreateRequest(StreamedRequest):
    from_: ModelReference | None = Field(default=None, alias="from", description="An existing model.")
    files: Blobs | None = Field(default=None, description="One GGUF file: maps its name to the digest of its blob.")
    adapters: Blobs | None = Field(default=None, description="A LoRA adapter as GGUF; `from` is its base model.")
    template: str | None = Field(default=None, description="Chat template, in Jinja or Go.")
    system: str | None = None
    parameters: Parameters | None = None
    messages: list[Message] | None = Field(default=None, max_length=1000, description="First messages of every chat.")
    license: str | list[str] | None = None
    quantize: str | None = Field(default=None, max_length=20, examples=["q4_K_M"])

    @model_validator(mode="after")
    def validate_combination(self) -> Self:
        if (self.from_ is None) == (self.files is None):
            raise ValueError("either from or files is required, but not both")
        if self.adapters is not None and self.from_ is None:
            raise ValueError("an adapter needs an existing base model: create that first, and name it in from")
        if self.adapters is not None and self.quantize is not None:
            raise ValueError("an adapter cannot be quantized")
        if len(self.model_dump_json(include={"template", "system", "messages", "license"})) > MAX_TEXT_LENGTH:
            raise ValueError(
                f"template, system, messages and license together may have {MAX_TEXT_LENGTH} characters at most"
            )
        return self

    def merge_defaults(self, inherited: ModelDefaults, template: str | None) -> ModelDefaults:
        """The defaults of this request. Those that it does not set are inherited."""
        licenses = [self.license] if isinstance(self.license, str) else self.license
        own_parameters = self.parameters.model_dump(exclude_none=True) if self.parameters else {}
        messages = (
            None if self.messages is None else [message.model_dump(exclude_none=True) for message in self.messages]
        )
        return ModelDefaults(
            template=inherited.template if template is None else template,
            system=inherited.system if self.system is None else self.system,
            parameters={**inherited.parameters, **own_parameters},
            messages=inherited.messages if messages is None else messages,
            license=inherited.license if licenses is None else licenses,
        )


class Progress(BaseModel):
    """A step of the work. The last one has the status success."""

    status: str
    digest: str | None = None
    total: int | None = None
    completed: int | None = None


PROGRESS_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The progress, one line for each step. If `stream` is false, only the last one.",
        "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
        "model": Progress,
    }
}
