"""How a service wants its API key."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ApiKeyScheme:
    """How an API key travels: in a header, or in the query of the address."""

    header: str | None = None
    query_parameter: str | None = None
    template: str = "{}"  # what stands in the header, with the key in it
    required: bool = True  # whether the service answers nobody without one

    def headers(self, key: str | None) -> dict[str, str]:
        return {self.header: self.template.format(key)} if self.header and key else {}

    def parameters(self, key: str | None) -> dict[str, str]:
        return {self.query_parameter: key} if self.query_parameter and key else {}
