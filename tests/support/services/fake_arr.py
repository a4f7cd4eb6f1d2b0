"""A fake Sonarr or Radarr on loopback that keeps state: what is written can be read again.

It checks every request and every response against the official OpenAPI document. A violation gets a 500, and makes
the test fail when the server stops.
"""

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from jsonschema import ValidationError

from tests.support.services.fake_services import ARR_STATUS, KEY
from tests.support.services.openapi_documents import check_request, check_response, document_path
from tests.support.services.stub_server import (
    StubRequest,
    StubResponse,
    StubServer,
    html_page,
    json_response,
    stub_server,
)

API = "/api/v3/"
ID_MAX = 2**31 - 1
PAGED = {"queue", "history", "blocklist", "wanted/missing", "wanted/cutoff"}
LONG_AGO = "2025-01-08T10:30:00Z"

Row = dict[str, Any]


@dataclass(frozen=True)
class ArrType:
    """The names that Sonarr or Radarr uses."""

    title: str
    version: str
    resource: str
    external_id: str  # the field with the id in the public catalog
    term: str  # the prefix of a lookup by that id
    already_added: str  # the error message


ARR_TYPES = {
    "sonarr": ArrType("Sonarr", "4.0.14.2939", "series", "tvdbId", "tvdb", "This series has already been added"),
    "radarr": ArrType("Radarr", "5.22.4.9896", "movie", "tmdbId", "tmdb", "This movie has already been added"),
}


@dataclass
class FakeArr:
    """`resources` has lists of rows, or one object where there is only one (`config/naming`), by the end of their path.
    A lookup searches `lookup_results`."""

    service: str
    resources: dict[str, Any] = field(default_factory=dict[str, Any])
    lookup_results: list[Row] = field(default_factory=list[Row])
    violations: list[str] = field(default_factory=list[str])
    server: StubServer = field(init=False)

    def __post_init__(self) -> None:
        document_path(self.service)  # without it, the test is skipped here
        for name in ("queue", "history", "blocklist", "command", "health", "tag", self.type.resource):
            self.resources.setdefault(name, [])
        self.resources.setdefault("qualityprofile", [quality_profile(1, "HD-1080p"), quality_profile(4, "Ultra-HD")])
        self.resources.setdefault("rootfolder", [root_folder(1, "/tv" if self.service == "sonarr" else "/movies")])

    @property
    def type(self) -> ArrType:
        return ARR_TYPES[self.service]

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def requests(self) -> list[StubRequest]:
        return self.server.requests

    @property
    def commands(self) -> list[Row]:
        """The body of each command, the latest last."""
        return [json.loads(request.body) for request in self.requests if _matches(request, "POST", "command")]

    def rows(self, name: str) -> list[Row]:
        return self.resources[name]

    def row(self, name: str, row_id: int) -> Row | None:
        return next((row for row in self.rows(name) if row["id"] == row_id), None)

    def add_row(self, name: str, row: Row) -> Row:
        """Add a row, with the next id if it has none."""
        rows = self.resources.setdefault(name, [])
        added = {**row, "id": row.get("id") or max((existing["id"] for existing in rows), default=0) + 1}
        rows.append(added)
        return added

    def __call__(self, request: StubRequest) -> StubResponse:
        if not request.path.startswith(API):
            return html_page(self.type.title)
        if request.headers.get("x-api-key") != KEY:
            return json_response({"error": "Unauthorized"}, 401)
        body = json.loads(request.body) if request.body else None
        try:
            check_request(self.service, request.method, request.path, request.query, body)
            reply = self._respond(request, body)
            if reply.status < 300:
                check_response(self.service, request.path, json.loads(reply.body), request.method)
        except (AssertionError, ValidationError, ValueError, LookupError) as error:
            self.violations.append(f"{request.method} {request.path}: {error!r}")
            return json_response({"message": self.violations[-1]}, 500)
        return reply

    def _respond(self, request: StubRequest, body: Any) -> StubResponse:
        end = request.path.removeprefix(API)
        special = self._special(request, end, body)
        if special is not None:
            return special
        name, _, last = end.rpartition("/")
        if end in self.resources:
            return self._respond_with_list(request, end, body)
        if name in self.resources and last.isdigit() and int(last) <= ID_MAX:
            return self._respond_with_row(request, name, int(last), body)
        return json_response({"message": "NotFound", "description": "There is nothing here."}, 404)

    def _special(self, request: StubRequest, end: str, body: Any) -> StubResponse | None:
        """The response of an operation that does more than read or write rows; None for any other."""
        handlers: dict[tuple[str, str], Callable[[], StubResponse]] = {
            ("GET", "system/status"): lambda: json_response(
                {"appName": self.type.title, "version": self.type.version, **ARR_STATUS}
            ),
            ("GET", f"{self.type.resource}/lookup"): lambda: json_response(self._look_up(request.query["term"])),
            ("POST", self.type.resource): lambda: self._add(body),
            ("POST", "command"): lambda: self._command(body),
            ("GET", "queue/details"): lambda: json_response(self.rows("queue")),
            ("GET", "history/since"): lambda: json_response(
                [row for row in self.rows("history") if row["date"] >= request.query["date"]]
            ),
            ("DELETE", "queue/bulk"): lambda: self._leave_queue(request, body["ids"]),
        }
        if (handler := handlers.get((request.method, end))) is not None:
            return handler()
        head, _, last = end.rpartition("/")
        if request.method == "POST" and head == "history/failed" and self.row("history", int(last)):
            return self._mark_failed(int(last))
        if request.method == "DELETE" and head == "queue" and last.isdigit() and self.row("queue", int(last)):
            return self._leave_queue(request, [int(last)])
        return None

    def _respond_with_list(self, request: StubRequest, name: str, body: Any) -> StubResponse:
        content = self.resources[name]
        if request.method == "POST":
            return json_response(self.add_row(name, body), 201)
        if name in PAGED:
            return json_response(_page(content, request.query))
        if isinstance(content, list):
            content = [
                row for row in content if all(_has_value(row, *parameter) for parameter in request.query.items())
            ]
        return json_response(content)

    def _respond_with_row(self, request: StubRequest, name: str, row_id: int, body: Any) -> StubResponse:
        content = self.resources[name]
        if isinstance(content, dict):
            if request.method == "PUT":
                content = self.resources[name] = body
            return json_response(content, 202 if request.method == "PUT" else 200)
        row = self.row(name, row_id)
        if row is None:
            kind = name.title()
            return json_response({"message": f"{kind} with ID {row_id} does not exist"}, 404)
        if request.method == "PUT":
            row.clear()
            row.update(body)
            return json_response(row, 202)
        if request.method == "DELETE":
            content.remove(row)
            return json_response({})
        return json_response(row)

    def _look_up(self, term: str) -> list[Row]:
        prefix, _, number = term.partition(":")
        external_id, library = self.type.external_id, self.rows(self.type.resource)
        if prefix == self.type.term and number.isdigit():
            rows = [row for row in self.lookup_results if row[external_id] == int(number)]
        else:
            rows = [row for row in self.lookup_results if term.casefold() in row["title"].casefold()]
        ids = {row[external_id]: {"id": row["id"]} for row in library}
        return [{**row, **ids.get(row[external_id], {})} for row in rows]

    def _add(self, body: Row) -> StubResponse:
        external_id = self.type.external_id
        errors: list[Row] = []
        if not self.row("qualityprofile", body.get("qualityProfileId", 0)):
            errors.append(_refusal("QualityProfileId", "Quality Profile does not exist"))
        if not any(row["path"] == body.get("rootFolderPath") for row in self.rows("rootfolder")):
            errors.append(_refusal("RootFolderPath", f"Root folder '{body.get('rootFolderPath')}' does not exist"))
        if any(row[external_id] == body[external_id] for row in self.rows(self.type.resource)):
            errors.append(_refusal(external_id[0].upper() + external_id[1:], self.type.already_added))
        if errors:
            return json_response(errors, 400)
        folder = body.get("folder") or body["title"]
        row = {**body, "added": LONG_AGO, "path": f"{body['rootFolderPath']}/{folder}"}
        row.pop("addOptions", None)
        return json_response(self.add_row(self.type.resource, row), 201)

    def _command(self, body: Row) -> StubResponse:
        command = {
            "name": body["name"],
            "commandName": body["name"],
            "body": body,
            "status": "queued",
            "queued": LONG_AGO,
        }
        return json_response(self.add_row("command", {**command, "trigger": "manual"}), 201)

    def _leave_queue(self, request: StubRequest, ids: list[int]) -> StubResponse:
        for row in [row for row in self.rows("queue") if row["id"] in ids]:
            # A download leaves the queue with all its episodes.
            same = [other for other in self.rows("queue") if other["downloadId"] == row["downloadId"]]
            for other in same:
                self.rows("queue").remove(other)
            if request.query.get("blocklist") == "true":
                for grabbed in [other for other in self.rows("history") if _is_grab_of(other, row["downloadId"])]:
                    self._mark_failed(grabbed["id"])
                columns = {name: row[name] for name in ("seriesId", "movieId", "protocol", "indexer") if name in row}
                self.add_row("blocklist", {**columns, "sourceTitle": row["title"], "date": LONG_AGO})
        return json_response({})

    def _mark_failed(self, row_id: int) -> StubResponse:
        grabbed = self.row("history", row_id)
        assert grabbed
        self.add_row("history", {**grabbed, "id": 0, "eventType": "downloadFailed"})
        return json_response({})


@asynccontextmanager
async def fake_arr(
    service: str, before: Callable[[StubRequest], StubResponse | None] = lambda request: None, **resources: Any
) -> AsyncGenerator[FakeArr]:
    """A fake that listens. `before` may respond in its place, for example with an error."""
    arr = FakeArr(service, resources)
    async with stub_server(lambda request: before(request) or arr(request)) as server:
        arr.server = server
        yield arr
    assert arr.violations == []


def quality_profile(row_id: int, name: str) -> Row:
    scores = {"minFormatScore": 0, "cutoffFormatScore": 10000, "minUpgradeFormatScore": 1}
    return {"id": row_id, "name": name, "upgradeAllowed": True, "cutoff": 7, "items": [], "formatItems": [], **scores}


def root_folder(row_id: int, path: str) -> Row:
    return {"id": row_id, "path": path, "accessible": True, "freeSpace": 10**12, "unmappedFolders": []}


def series(title: str, tvdb_id: int, year: int = 2008, **fields: Any) -> Row:
    """A series as a lookup finds it."""
    season = {"seasonNumber": 1, "monitored": True}
    return {
        "title": title,
        "sortTitle": title.casefold(),
        "tvdbId": tvdb_id,
        "year": year,
        "status": "ended",
        "overview": f"What happens in {title}.",
        "network": "AMC",
        "runtime": 47,
        "seasons": [{**season, "seasonNumber": 0, "monitored": False}, season],
        "genres": ["Drama"],
        "tags": [],
        "titleSlug": f"series-{tvdb_id}",
        "folder": title.replace("/", "+"),
        "images": [{"coverType": "poster", "remoteUrl": "https://artworks.example/poster.jpg"}],
        **fields,
    }


def library_series(title: str, tvdb_id: int, row_id: int, **fields: Any) -> Row:
    """A series in the library, with seven episodes."""
    counts = {"episodeFileCount": 7, "episodeCount": 7, "totalEpisodeCount": 7, "sizeOnDisk": 15360000000}
    statistics = {**counts, "releaseGroups": [], "percentOfEpisodes": 100}
    row = series(title, tvdb_id)
    first, *others = row["seasons"]
    return {
        **row,
        "id": row_id,
        "seasons": [first, *({**season, "statistics": statistics} for season in others)],
        "statistics": {**statistics, "seasonCount": len(others)},
        "monitored": True,
        "seasonFolder": True,
        "qualityProfileId": 1,
        "path": f"/tv/{title}",
        "added": LONG_AGO,
        **fields,
    }


def movie(title: str, tmdb_id: int, year: int = 1999, **fields: Any) -> Row:
    """A movie as a lookup finds it."""
    return {
        "title": title,
        "sortTitle": title.casefold(),
        "tmdbId": tmdb_id,
        "year": year,
        "status": "released",
        "overview": f"What happens in {title}.",
        "runtime": 136,
        "genres": ["Action", "Science Fiction"],
        "ratings": {"tmdb": {"votes": 18500, "value": 8.2, "type": "user"}},
        "tags": [],
        "titleSlug": str(tmdb_id),
        "folder": f"{title.replace('/', '+')} ({year})",
        "images": [{"coverType": "poster", "remoteUrl": "https://artworks.example/poster.jpg"}],
        **fields,
    }


def library_movie(title: str, tmdb_id: int, row_id: int, **fields: Any) -> Row:
    """A movie in the library, with its file."""
    row, size = movie(title, tmdb_id), 8589934592
    quality = {"quality": {"id": 7, "name": "Bluray-1080p", "source": "bluray", "resolution": 1080}}
    file = {"id": row_id, "movieId": row_id, "relativePath": f"{title}.mkv", "size": size, "quality": quality}
    return {
        **row,
        "id": row_id,
        "monitored": True,
        "minimumAvailability": "released",
        "qualityProfileId": 1,
        "path": f"/movies/{row['folder']}",
        "hasFile": True,
        "sizeOnDisk": size,
        "movieFile": file,
        "added": LONG_AGO,
        **fields,
    }


def queue_row(title: str, row_id: int, **fields: Any) -> Row:
    """A row of the queue; `seriesId` and `episodeId`, or `movieId`, say what it is for."""
    return {
        "id": row_id,
        "title": title,
        "size": 2e9,
        "sizeleft": 1e9,
        "timeleft": "00:15:30",
        "status": "downloading",
        "trackedDownloadStatus": "ok",
        "trackedDownloadState": "downloading",
        "statusMessages": [],
        "downloadId": f"SABnzbd_nzo_{row_id}",
        "protocol": "usenet",
        "downloadClient": "SABnzbd",
        "indexer": "NZBgeek",
        "added": LONG_AGO,
        **fields,
    }


def _matches(request: StubRequest, method: str, end: str) -> bool:
    return (request.method, request.path) == (method, API + end)


def _is_grab_of(row: Row, download_id: str) -> bool:
    return row["eventType"] == "grabbed" and row.get("downloadId") == download_id


def _has_value(row: Row, name: str, value: str) -> bool:
    """Whether a row has this value, if it has such a field at all."""
    return name not in row or str(row[name]).casefold() == value.casefold()


def _page(rows: list[Row], query: dict[str, str]) -> Row:
    page, size = int(query.get("page", 1)), int(query.get("pageSize", 10))
    ordered = list(rows)
    if (key := query.get("sortKey")) is not None:
        ordered.sort(key=lambda row: row.get(key) or 0, reverse=query.get("sortDirection") == "descending")
    records = ordered[(page - 1) * size : page * size]
    return {"page": page, "pageSize": size, "totalRecords": len(rows), "records": records}


def _refusal(name: str, message: str) -> Row:
    return {"propertyName": name, "errorMessage": message, "severity": "error"}
