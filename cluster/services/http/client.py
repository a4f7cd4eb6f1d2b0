"""The HTTP client for outside services. It alone translates failed calls to the errors of `cluster/services/errors.py`.

Every call has a deadline, and every response a size limit. Redirects are followed only on the same server. Only
requests that change nothing are repeated. Messages never contain the key.
"""

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, Literal, Self, TypeVar, cast
from urllib.parse import quote

import httpx
import orjson
from pydantic import TypeAdapter, ValidationError

from cluster.logs import MASK, redact
from cluster.services.errors import (
    BadResponse,
    ErrorInResponse,
    NotFoundInService,
    Refused,
    ServiceError,
    Unauthorized,
    Unreachable,
    WrongService,
)
from cluster.services.http.api_key import ApiKeyScheme
from cluster.services.http.connection import (
    LARGE_BODY_BYTES,
    Connection,
    ServiceResponse,
    extract_message,
    tls_context,
)
from cluster.services.http.json_stream import WHITESPACE, JsonListParser, NotAnObjectList
from cluster.services.http.urls import CheckedTransport
from cluster.settings import get_settings

MAX_BYTES = 64 * 1024 * 1024
MAX_LIST_BYTES = 1024 * 1024 * 1024
"""Limit of a list that is parsed object by object."""
MAX_REDIRECTS = 3
CONNECT_SECONDS = 5.0
MAX_MESSAGE_LENGTH = 300
UNAVAILABLE_STATUSES = {429, 502, 503, 504}
"""The service is too busy, or a proxy cannot reach it."""
CONNECTION_ERRORS = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError, httpx.CloseError)

Method = Literal["GET", "POST", "PUT", "DELETE"]
Parameter = str | int | float | bool
OnItem = Callable[[dict[str, Any]], None]
Failure = TypeVar("Failure", bound=ServiceError)
Kind = TypeVar("Kind")


class Client:
    """Calls one service: `async with Client(connection).open() as client`."""

    def __init__(self, connection: Connection, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.connection = connection
        self.successes = 0
        self.failures = 0  # since the last success
        self.last_failure: ServiceError | None = None
        self._seconds = get_settings().services.timeout_seconds
        self._http = httpx.AsyncClient(
            transport=CheckedTransport(
                transport or httpx.AsyncHTTPTransport(verify=tls_context(connection.verify_tls))
            ),
            timeout=httpx.Timeout(self._seconds, connect=min(CONNECT_SECONDS, self._seconds)),
            headers={"Accept-Encoding": "gzip, deflate", "User-Agent": "Forgearr"},
            trust_env=False,
        )
        self._headers: dict[str, str] = {}
        self._last_counted: ServiceError | None = None
        self._counts_before: tuple[int, int] | None = None  # before the last response was counted

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[Self]:
        """Open the client. If the service has sessions, log in, and log out at the end."""
        session, key = self.connection.profile.session, self.connection.key
        async with self._http:
            if session is None or key is None:
                yield self
                return
            async with session(self, key):
                yield self

    async def get(self, path: str, *, seconds: float | None = None, **parameters: Parameter) -> Any:
        return await self._call("GET", path, parameters, self._parse_json, seconds=seconds)

    async def get_once(self, path: str, **parameters: Parameter) -> Any:
        """Send a GET that changes something, as some services have it. It is never repeated."""
        return await self._call("GET", path, parameters, self._parse_json, once=True)

    async def for_each_item(
        self, path: str, on_item: OnItem, *, seconds: float | None = None, **parameters: Parameter
    ) -> None:
        """Call `on_item` with each object of a list that may be too long for the memory."""
        await self._call("GET", path, parameters, self._check_list_streamed, seconds=seconds, on_item=on_item)

    async def post(
        self, path: str, body: object = None, *, seconds: float | None = None, **parameters: Parameter
    ) -> Any:
        return await self._call("POST", path, parameters, self._parse_json_or_none, body=body, seconds=seconds)

    async def put(self, path: str, body: object = None, **parameters: Parameter) -> Any:
        return await self._call("PUT", path, parameters, self._parse_json_or_none, body=body)

    async def delete(self, path: str, **parameters: Parameter) -> Any:
        return await self._call("DELETE", path, parameters, self._parse_json_or_none)

    async def get_text(self, path: str) -> str:
        """Send a GET that returns a line of text, not JSON."""
        return await self._call("GET", path, {}, self._parse_text)

    async def post_form(self, path: str, fields: Mapping[str, str]) -> str:
        """Send a form, as a browser does, and return the response, a line of text."""
        return await self._call("POST", path, {}, self._parse_text, form=fields)

    async def root_page_title(self) -> str | None:
        """Return the title of the web page at the service's address."""
        try:
            return (await self._exchange("GET", "/", {}, accept="text/html")).title
        except ServiceError:
            return None

    def set_headers(self, headers: Mapping[str, str]) -> None:
        """For connectors: set headers for all further requests, such as one with the key."""
        self._headers = dict(headers)

    def require_keys(self, response: Any, *keys: str) -> dict[str, Any]:
        """For connectors: return the response if it has these fields. Else another program has sent it."""
        if not isinstance(response, dict) or not set(keys) <= response.keys():
            raise self.wrong_service()
        return cast(dict[str, Any], response)

    def parse(self, kind: type[Kind], response: object) -> Kind:
        """For connectors: validate a response against its type. An invalid one is a failure of the service."""
        try:
            return _type_adapter(kind).validate_python(response)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            location = ".".join(map(str, problem["loc"])) or "the whole"
            message = f"{self.connection.name} answers with something unexpected: {location}: {problem['msg']}."
            raise self._uncount_success(BadResponse(self._sanitize(message))) from None

    def wrong_service(self, found: object = None) -> WrongService:
        """For connectors: the error for a response of another program."""
        name, expected = self.connection.name, self.connection.profile.title
        if found:
            message = f"{self._sanitize(str(found))} answers at the address of {name}, not {expected}."
        else:
            message = f"The program that answers at the address of {name} is not {expected}."
        return self._uncount_success(WrongService(message))

    def unauthorized(self, detail: str = "") -> Unauthorized:
        """For connectors: the error for a missing or wrong key."""
        name, suffix = self.connection.name, _detail_suffix(self._sanitize(detail))
        if self.connection.key is None:
            return self._count_error(Unauthorized(f"{name} requires an API key, and none is set{suffix}"))
        return self._count_error(Unauthorized(f"{name} does not accept Forgearr with this API key{suffix}"))

    def _count_error(self, error: Failure) -> Failure:
        """Count an error, once. A refusal counts as a success, because it shows that the service works."""
        if error is self._last_counted:
            return error
        self._last_counted = error
        if error.is_failure:
            self.failures += 1
            self.last_failure = error
        else:
            self._count_success()
        return error

    def _uncount_success(self, error: Failure) -> Failure:
        """Count an error instead of the success of the last response, whose content is not valid."""
        if self._counts_before is not None:
            self.successes, self.failures = self._counts_before
            self._counts_before = None
        return self._count_error(error)

    def _count_success(self) -> None:
        self._counts_before = self.successes, self.failures
        self.successes += 1
        self.failures = 0

    async def _call(
        self,
        method: Method,
        path: str,
        parameters: Mapping[str, Parameter],
        parse: Callable[[ServiceResponse], Awaitable[Any]],
        **options: Any,
    ) -> Any:
        try:
            content = await parse(await self._exchange(method, path, parameters, **options))
        except ServiceError as error:
            self._count_error(error)
            raise
        self._count_success()
        return content

    async def _exchange(
        self,
        method: Method,
        path: str,
        parameters: Mapping[str, Parameter],
        *,
        body: object = None,
        form: Mapping[str, str] | None = None,
        seconds: float | None = None,
        on_item: OnItem | None = None,
        once: bool = False,
        accept: str = "application/json",
    ) -> ServiceResponse:
        """Send a request and return a successful response. Every failure is raised as a ServiceError."""
        key, key_scheme = self.connection.key, self.connection.profile.key_scheme or ApiKeyScheme()
        request: dict[str, Any] = {
            "params": {**parameters, **key_scheme.parameters(key)} or None,
            "headers": {"Accept": accept, **key_scheme.headers(key), **self._headers},
            "json": body,
            "data": form,
        }
        name = self.connection.name
        if seconds is None:
            seconds = self._seconds
        else:
            request["timeout"] = httpx.Timeout(seconds, connect=min(CONNECT_SECONDS, seconds))
        try:
            async with asyncio.timeout(seconds):
                response = await self._send(method, f"{self.connection.url}{path}", request, on_item, once=once)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise Unreachable(f"{name} did not answer within {seconds:g} seconds.") from error
        except httpx.DecodingError as error:
            raise BadResponse(f"{name} sent a response that cannot be decompressed.") from error
        except (httpx.RequestError, httpx.InvalidURL, ssl.SSLError) as error:
            raise Unreachable(f"{name} cannot be reached: {self._reason(error)}.") from error
        return self._check_status(response, path)

    async def _send(
        self, method: Method, url: str, request: dict[str, Any], on_item: OnItem | None, *, once: bool
    ) -> ServiceResponse:
        for _ in range(MAX_REDIRECTS + 1):
            response = await self._send_with_retry(method, url, request, on_item, once=once)
            if response.location is None:
                return response
            url, request = self._redirect_target(method, url, response.location), {**request, "params": None}
        raise BadResponse(f"{self.connection.name} redirects more than {MAX_REDIRECTS} times.")

    async def _send_with_retry(
        self, method: Method, url: str, request: dict[str, Any], on_item: OnItem | None, *, once: bool
    ) -> ServiceResponse:
        """Send a request. If the connection breaks, a GET is sent again, unless it is `once` or streams items."""
        try:
            return await self._read_response(method, url, request, on_item)
        except CONNECTION_ERRORS:
            if method != "GET" or once or on_item is not None:
                raise
            return await self._read_response(method, url, request, on_item)

    async def _read_response(
        self, method: Method, url: str, request: dict[str, Any], on_item: OnItem | None
    ) -> ServiceResponse:
        content = bytearray()
        async with self._http.stream(method, url, **request) as response:
            if "," in response.headers.get("content-encoding", ""):
                # Each layer multiplies the size by up to a thousand, within one chunk.
                raise BadResponse(f"{self.connection.name} sent a response that is compressed more than once.")
            chunks = response.aiter_bytes()
            async for chunk in chunks:
                content += chunk
                if on_item and response.is_success and content.lstrip(WHITESPACE).startswith(b"["):
                    await self._stream_items(bytes(content), chunks, on_item)
                    return ServiceResponse(response.status_code, b"[]")
                if len(content) > MAX_BYTES:
                    raise self._too_large(MAX_BYTES)
            location = response.headers.get("location") if response.has_redirect_location else None
            return ServiceResponse(response.status_code, bytes(content), location)

    async def _stream_items(self, first_chunk: bytes, chunks: AsyncIterator[bytes], on_item: OnItem) -> None:
        parser, length, chunk = JsonListParser(), 0, first_chunk
        try:
            while True:
                length += len(chunk)
                if length > MAX_LIST_BYTES:
                    raise self._too_large(MAX_LIST_BYTES)
                for item in parser.feed(chunk):
                    on_item(item)
                chunk = await anext(chunks)
        except StopAsyncIteration:
            if not parser.is_complete:
                raise BadResponse(f"{self.connection.name} sent only a part of a list.") from None
        except NotAnObjectList as error:
            raise BadResponse(f"{self.connection.name} sent a list that cannot be parsed: {error}.") from None

    def _too_large(self, max_bytes: int) -> BadResponse:
        return BadResponse(f"{self.connection.name} sent more than {max_bytes // 1024 // 1024} MiB.")

    def _redirect_target(self, method: Method, url: str, location: str) -> str:
        """Return the URL of a redirect on the same server. The key must not be sent to another one."""
        current, target = httpx.URL(url), httpx.URL(url).join(location)
        is_same_server = (target.scheme, target.host, target.port) == (current.scheme, current.host, current.port)
        if method == "GET" and is_same_server:
            return str(target)
        target_origin = self._sanitize(f"{target.scheme}://{target.netloc.decode(errors='replace')}")
        raise BadResponse(
            f"{self.connection.name} redirects to {target_origin}; if that is correct, set it as the url."
        )

    def _check_status(self, response: ServiceResponse, path: str) -> ServiceResponse:
        """Return a successful response. For another status, raise the error."""
        if response.status < 300:
            return response
        name, suffix = self.connection.name, _detail_suffix(self._error_text(response))
        if response.status in {401, 403}:
            raise self.unauthorized(self._error_text(response))
        if response.status == 404:
            raise NotFoundInService(f"{name} has nothing at {self._sanitize(path)}{suffix}")
        if response.status in UNAVAILABLE_STATUSES:
            raise Unreachable(f"{name} is not available, status {response.status}{suffix}")
        if 400 <= response.status < 500:
            raise Refused(f"{name} refuses the request, status {response.status}{suffix}")
        raise BadResponse(f"{name} fails with status {response.status}{suffix}")

    async def _parse_json(self, response: ServiceResponse) -> Any:
        """Return the content of a JSON response."""
        name = self.connection.name
        if response.is_html:
            page = f"a web page titled '{self._sanitize(response.title)}'" if response.title else "a web page"
            raise BadResponse(f"{name} answers with {page}: check its address.")
        try:
            if len(response.content) > LARGE_BODY_BYTES:
                content = await asyncio.to_thread(orjson.loads, response.content)
            else:
                content = orjson.loads(response.content)
        except orjson.JSONDecodeError as error:
            raise BadResponse(f"{name} sent something that is not JSON, or only a part of it.") from error
        try:
            return self.connection.profile.unwrap(content)
        except ErrorInResponse as error:
            message = self._sanitize(error.message)
            if error.is_key_error:
                raise self.unauthorized(message) from None  # the original message may contain the key
            raise Refused(f"{name} refuses the request{_detail_suffix(message)}") from None

    async def _check_list_streamed(self, response: ServiceResponse) -> None:
        """Check the rest of a list whose objects were streamed: it is an empty list."""
        content = await self._parse_json(response)
        if content != []:
            message = self._sanitize(extract_message(content))
            raise BadResponse(f"{self.connection.name} sent something that is not a list{_detail_suffix(message)}")

    async def _parse_json_or_none(self, response: ServiceResponse) -> Any:
        return await self._parse_json(response) if response.content.strip() else None

    async def _parse_text(self, response: ServiceResponse) -> str:
        text = response.content[:MAX_MESSAGE_LENGTH].decode(errors="replace").strip()
        if response.is_html or not text.isprintable():
            raise BadResponse(f"{self.connection.name} does not answer with a line of text: check its address.")
        return text

    def _error_text(self, response: ServiceResponse) -> str:
        """Return the message in an error response."""
        if response.is_html:
            return self._sanitize(response.title or "")
        try:
            return self._sanitize(extract_message(orjson.loads(response.content)))
        except orjson.JSONDecodeError:
            return self._sanitize(response.content[:LARGE_BODY_BYTES].decode(errors="replace"))

    def _reason(self, error: Exception) -> str:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return "its certificate is not trusted; if it is self-signed, set verify_tls to false"
        return self._sanitize(str(error)).rstrip(".") or "the connection broke"

    def _sanitize(self, text: str) -> str:
        """Make a service's text fit for messages: one line, a limited length, without the key."""
        key = self.connection.key or ""
        for secret in sorted({key, quote(key, safe=""), key.partition(":")[2]}, key=len, reverse=True):
            text = text.replace(secret, MASK) if secret else text
        return redact(" ".join(text.split())[:MAX_MESSAGE_LENGTH])


@cache
def _type_adapter(kind: type[Kind]) -> TypeAdapter[Kind]:
    return TypeAdapter(kind)


def _detail_suffix(detail: str) -> str:
    return f": {detail.rstrip('.')}." if detail else "."
