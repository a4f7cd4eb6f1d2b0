"""How a service is asked over HTTP, and the one place where what goes wrong gets a name of ours.

Every call has a deadline; an answer is read up to a bound, and as JSON; a redirect is followed only to the same server;
only what changes nothing is tried again. Nothing that is said of a call holds a key.
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
    ErrorInside,
    NotThere,
    Refused,
    ServiceError,
    Unauthorised,
    Unreachable,
    WrongService,
)
from cluster.services.http.api_key import Key
from cluster.services.http.connection import LONG_BYTES, Answer, Connection, tls_context
from cluster.services.http.json_stream import BLANK, NotAList, Objects
from cluster.services.http.urls import CheckedTransport
from cluster.settings import get_settings

MAX_BYTES = 64 * 1024 * 1024
MAX_LIST_BYTES = 1024 * 1024 * 1024
"""Of a list that is read object by object."""
MAX_REDIRECTS = 3
CONNECT_SECONDS = 5.0
MAX_WORDS = 300
AWAY = {429, 502, 503, 504}
"""Too busy, or a proxy in front of a service that is not there."""
BROKEN = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError, httpx.CloseError)

ERROR_FIELDS = ("errorMessage", "message", "error", "detail", "errors", "status")

Method = Literal["GET", "POST", "PUT", "DELETE"]
Parameter = str | int | float | bool
Take = Callable[[dict[str, Any]], None]
Failure = TypeVar("Failure", bound=ServiceError)
Kind = TypeVar("Kind")


class Client:
    """Asks one service, while it is open: `async with Client(connection).open() as client`."""

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
        self._before: tuple[int, int] | None = None  # what was counted before the last answer

    @asynccontextmanager
    async def open(self) -> AsyncGenerator[Self]:
        """Logged in, where the service wants that."""
        session, key = self.connection.connector.session, self.connection.key
        async with self._http:
            if session is None or key is None:
                yield self
                return
            async with session(self, key):
                yield self

    async def get(self, path: str, *, seconds: float | None = None, **parameters: Parameter) -> Any:
        return await self._call("GET", path, parameters, self._content, seconds=seconds)

    async def act(self, path: str, **parameters: Parameter) -> Any:
        """A GET that changes something, as some services have it: it is sent once, whatever comes of it."""
        return await self._call("GET", path, parameters, self._content, once=True)

    async def each(self, path: str, take: Take, *, seconds: float | None = None, **parameters: Parameter) -> None:
        """Have `take` called with each object of a list that may be too long to be held."""
        await self._call("GET", path, parameters, self._listed, seconds=seconds, take=take)

    async def post(
        self, path: str, body: object = None, *, seconds: float | None = None, **parameters: Parameter
    ) -> Any:
        return await self._call("POST", path, parameters, self._content_or_nothing, body=body, seconds=seconds)

    async def put(self, path: str, body: object = None, **parameters: Parameter) -> Any:
        return await self._call("PUT", path, parameters, self._content_or_nothing, body=body)

    async def delete(self, path: str, **parameters: Parameter) -> Any:
        return await self._call("DELETE", path, parameters, self._content_or_nothing)

    async def line(self, path: str) -> str:
        """The answer of the few calls that are answered in plain text."""
        return await self._call("GET", path, {}, self._line)

    async def send_form(self, path: str, fields: Mapping[str, str]) -> str:
        """Send a form as a browser does; the answer is a line of text."""
        return await self._call("POST", path, {}, self._line, form=fields)

    async def front_page(self) -> str | None:
        """The title of the page that people see at this address."""
        try:
            return (await self._exchange("GET", "/", {}, accept="text/html")).title
        except ServiceError:
            return None

    def always_send(self, headers: Mapping[str, str]) -> None:
        """For connectors whose key has several forms."""
        self._headers = dict(headers)

    def expect(self, answer: Any, *names: str) -> dict[str, Any]:
        """For connectors: the answer, if it has these fields; else something else has answered."""
        if not isinstance(answer, dict) or not set(names) <= answer.keys():
            raise self.wrong()
        return cast(dict[str, Any], answer)

    def read(self, kind: type[Kind], answer: object) -> Kind:
        """For connectors: the answer, as what it should be. Services leave out, add and garble what they like."""
        try:
            return _adapter(kind).validate_python(answer)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, problem["loc"])) or "all of it"
            said = f"{self.connection.name} answers with something unexpected: {place}: {problem['msg']}."
            raise self._disbelieved(BadResponse(self._clean(said))) from None

    def wrong(self, found: object = None) -> WrongService:
        """For connectors: something answers, but as something else."""
        name, wanted = self.connection.name, self.connection.connector.title
        if found:
            said = f"{self._clean(str(found))} answers at the address of {name}, not {wanted}."
        else:
            said = f"What answers at the address of {name} is not {wanted}."
        return self._disbelieved(WrongService(said))

    def refuses_key(self, words: str = "") -> Unauthorised:
        """For connectors: the service does not know us."""
        name, said = self.connection.name, _said(self._clean(words))
        if self.connection.key is None:
            return self._counted(Unauthorised(f"{name} wants an API key, and has been given none{said}"))
        return self._counted(Unauthorised(f"{name} does not accept Forgearr with this API key{said}"))

    def _counted(self, error: Failure) -> Failure:
        """Count how a call has ended, once: that the service refuses shows, too, that it works."""
        if error is self._last_counted:
            return error
        self._last_counted = error
        if error.is_failure:
            self.failures += 1
            self.last_failure = error
        else:
            self._succeeded()
        return error

    def _disbelieved(self, error: Failure) -> Failure:
        """The last answer came well, and makes no sense: that was no success."""
        if self._before is not None:
            self.successes, self.failures = self._before
            self._before = None
        return self._counted(error)

    def _succeeded(self) -> None:
        self._before = self.successes, self.failures
        self.successes += 1
        self.failures = 0

    async def _call(
        self,
        method: Method,
        path: str,
        parameters: Mapping[str, Parameter],
        read: Callable[[Answer], Awaitable[Any]],
        **sent: Any,
    ) -> Any:
        try:
            content = await read(await self._exchange(method, path, parameters, **sent))
        except ServiceError as error:
            self._counted(error)
            raise
        self._succeeded()
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
        take: Take | None = None,
        once: bool = False,
        accept: str = "application/json",
    ) -> Answer:
        """The line of defence: from here on there are only errors of ours, and answers that are no error."""
        key, travels = self.connection.key, self.connection.connector.key or Key()
        request: dict[str, Any] = {
            "params": {**parameters, **travels.parameters(key)} or None,
            "headers": {"Accept": accept, **travels.headers(key), **self._headers},
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
                answer = await self._send(method, f"{self.connection.url}{path}", request, take, once=once)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise Unreachable(f"{name} did not answer within {seconds:g} seconds.") from error
        except httpx.DecodingError as error:
            raise BadResponse(f"{name} answers with something that cannot be unpacked.") from error
        except (httpx.RequestError, httpx.InvalidURL, ssl.SSLError) as error:
            raise Unreachable(f"{name} cannot be reached: {self._reason(error)}.") from error
        return self._accepted(answer, path)

    async def _send(
        self, method: Method, url: str, request: dict[str, Any], take: Take | None, *, once: bool
    ) -> Answer:
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._again(method, url, request, take, once=once)
            if answer.location is None:
                return answer
            url, request = self._redirected(method, url, answer.location), {**request, "params": None}
        raise BadResponse(f"{self.connection.name} sends its callers in circles.")

    async def _again(
        self, method: Method, url: str, request: dict[str, Any], take: Take | None, *, once: bool
    ) -> Answer:
        """One request; one that changes nothing is sent again if the connection breaks, unless some of it was taken."""
        try:
            return await self._read(method, url, request, take)
        except BROKEN:
            if method != "GET" or once or take is not None:
                raise
            return await self._read(method, url, request, take)

    async def _read(self, method: Method, url: str, request: dict[str, Any], take: Take | None) -> Answer:
        content = bytearray()
        async with self._http.stream(method, url, **request) as response:
            parts = response.aiter_bytes()
            async for part in parts:
                content += part
                if take and response.is_success and content.lstrip(BLANK).startswith(b"["):
                    await self._take_each(bytes(content), parts, take)
                    return Answer(response.status_code, b"[]")
                if len(content) > MAX_BYTES:
                    raise self._too_long(MAX_BYTES)
            location = response.headers.get("location") if response.has_redirect_location else None
            return Answer(response.status_code, bytes(content), location)

    async def _take_each(self, begin: bytes, parts: AsyncIterator[bytes], take: Take) -> None:
        objects, length, part = Objects(), 0, begin
        try:
            while True:
                length += len(part)
                if length > MAX_LIST_BYTES:
                    raise self._too_long(MAX_LIST_BYTES)
                for one in objects.feed(part):
                    take(one)
                part = await anext(parts)
        except StopAsyncIteration:
            if not objects.ended:
                raise BadResponse(f"{self.connection.name} answers with only a part of a list.") from None
        except NotAList as error:
            raise BadResponse(f"{self.connection.name} answers with a list that cannot be read: {error}.") from None

    def _too_long(self, most: int) -> BadResponse:
        return BadResponse(f"{self.connection.name} answers with more than {most // 1024 // 1024} MiB.")

    def _redirected(self, method: Method, url: str, location: str) -> str:
        """Where to ask instead, if that is on the same server: a key goes nowhere else."""
        here, target = httpx.URL(url), httpx.URL(url).join(location)
        if method == "GET" and (target.scheme, target.host, target.port) == (here.scheme, here.host, here.port):
            return str(target)
        place = self._clean(f"{target.scheme}://{target.netloc.decode(errors='replace')}")
        raise BadResponse(f"{self.connection.name} sends its callers to {place}: if that is right, make it the url.")

    def _accepted(self, answer: Answer, path: str) -> Answer:
        """The answer, if its status says that it is one."""
        if answer.status < 300:
            return answer
        name, said = self.connection.name, _said(self._words(answer))
        if answer.status in {401, 403}:
            raise self.refuses_key(self._words(answer))
        if answer.status == 404:
            raise NotThere(f"{name} has nothing at {self._clean(path)}{said}")
        if answer.status in AWAY:
            raise Unreachable(f"{name} is not there right now, status {answer.status}{said}")
        if 400 <= answer.status < 500:
            raise Refused(f"{name} refuses this, status {answer.status}{said}")
        raise BadResponse(f"{name} fails with status {answer.status}{said}")

    async def _content(self, answer: Answer) -> Any:
        """What is in an answer of JSON."""
        name = self.connection.name
        if answer.is_page:
            page = f"a web page titled '{self._clean(answer.title)}'" if answer.title else "a web page"
            raise BadResponse(f"{name} answers with {page}: is its address right?")
        try:
            if len(answer.content) > LONG_BYTES:
                content = await asyncio.to_thread(orjson.loads, answer.content)
            else:
                content = orjson.loads(answer.content)
        except orjson.JSONDecodeError as error:
            raise BadResponse(f"{name} answers with something that is not JSON, or only a part of it.") from error
        try:
            return self.connection.connector.unwrap(content)
        except ErrorInside as error:
            words = self._clean(error.words)
            if error.concerns_key:
                raise self.refuses_key(words) from None  # the words as they were may hold the key
            raise Refused(f"{name} refuses this{_said(words)}") from None

    async def _listed(self, answer: Answer) -> None:
        """What is left of a list when each of its objects was taken."""
        content = await self._content(answer)
        if content != []:
            words = self._clean(_message(content))
            raise BadResponse(f"{self.connection.name} answers with something that is no list{_said(words)}")

    async def _content_or_nothing(self, answer: Answer) -> Any:
        return await self._content(answer) if answer.content.strip() else None

    async def _line(self, answer: Answer) -> str:
        text = answer.content[:MAX_WORDS].decode(errors="replace").strip()
        if answer.is_page or not text.isprintable():
            raise BadResponse(f"{self.connection.name} does not answer with a line of text: is its address right?")
        return text

    def _words(self, answer: Answer) -> str:
        """What a service says of its refusal."""
        if answer.is_page:
            return self._clean(answer.title or "")
        try:
            return self._clean(_message(orjson.loads(answer.content)))
        except orjson.JSONDecodeError:
            return self._clean(answer.content[:LONG_BYTES].decode(errors="replace"))

    def _reason(self, error: Exception) -> str:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return "nobody vouches for its certificate; if it is your own, set verify_tls to false"
        return self._clean(str(error)).rstrip(".") or "the connection broke"

    def _clean(self, text: str) -> str:
        """Words of a service as they may be shown: on a line, bounded, without the key."""
        key = self.connection.key or ""
        for secret in sorted({key, quote(key, safe=""), key.partition(":")[2]}, key=len, reverse=True):
            text = text.replace(secret, MASK) if secret else text
        return redact(" ".join(text.split())[:MAX_WORDS])


@cache
def _adapter(kind: type[Kind]) -> TypeAdapter[Kind]:
    return TypeAdapter(kind)


def _message(said: Any) -> str:
    """The sentence in an error of any of the shapes that services give theirs."""
    if isinstance(said, list):
        return "; ".join(filter(None, map(_message, said[:5])))
    if isinstance(said, dict):
        return next((_message(said[name]) for name in ERROR_FIELDS if said.get(name)), "")
    return str(said) if isinstance(said, str) else ""


def _said(words: str) -> str:
    return f": {words.rstrip('.')}." if words else "."
