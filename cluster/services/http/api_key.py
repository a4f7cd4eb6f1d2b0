"""How a service expects its API key: in a header, or in the query of the URL."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ApiKeyScheme:
    header: str | None = None
    query_parameter: str | None = None
    template: str = "{}"  # the value of the header, with {} for the key
    required: bool = True  # whether the service answers no request without a key

    def headers(self, key: str | None) -> dict[str, str]:
        return {self.header: self.template.format(key)} if self.header and key else {}

    def parameters(self, key: str | None) -> dict[str, str]:
        return {self.query_parameter: key} if self.query_parameter and key else {}
