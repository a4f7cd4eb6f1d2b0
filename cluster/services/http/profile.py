"""The part of a connector that the HTTP client reads, so that the client needs to know no connector."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from cluster.services.http.api_key import ApiKeyScheme


class ServiceProfile(Protocol):
    @property
    def title(self) -> str: ...

    @property
    def key_scheme(self) -> ApiKeyScheme | None: ...

    @property
    def unwrap(self) -> Callable[[Any], Any]: ...

    @property
    def session(self) -> Callable[[Any, str], AbstractAsyncContextManager[None]] | None: ...
