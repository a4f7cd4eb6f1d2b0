"""Sonarr or Radarr with a memory, on loopback: what is written can be read again.

Every request and every answer is held against the official document; where one breaks it, the answer is a 500 that says
so, and the test fails at the latest when the stand-in goes.
"""

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from jsonschema import ValidationError

from tests.support.services.fake_services import ARR_STATUS, KEY
from tests.support.services.openapi_documents import check_answer, check_request, document_path
from tests.support.services.stub_server import Asked, Reply, StandIn, page, standing_in, telling

API = "/api/v3/"
ID_MAX = 2**31 - 1
PAGED = {"queue", "history", "blocklist", "wanted/missing", "wanted/cutoff"}
LONG_AGO = "2025-01-08T10:30:00Z"

Row = dict[str, Any]


@dataclass(frozen=True)
class Sort:
    """What Sonarr and Radarr call what they keep."""

    title: str
    version: str
    things: str  # the resource
    outer_id: str  # what a thing is called in the world
    term: str  # how it is looked up by that
    added: str


SORTS = {
    "sonarr": Sort("Sonarr", "4.0.14.2939", "series", "tvdbId", "tvdb", "This series has already been added"),
    "radarr": Sort("Radarr", "5.22.4.9896", "movie", "tmdbId", "tmdb", "This movie has already been added"),
}


@dataclass
class ArrStandIn:
    """`resources` are lists of rows, or one object for what there is only one of (`config/naming`), by the end of their
    path. `catalogue` is what a lookup finds."""

    service: str
    resources: dict[str, Any] = field(default_factory=dict[str, Any])
    catalogue: list[Row] = field(default_factory=list[Row])
    complaints: list[str] = field(default_factory=list[str])
    server: StandIn = field(init=False)

    def __post_init__(self) -> None:
        document_path(self.service)  # without it, the test is skipped here
        for name in ("queue", "history", "blocklist", "command", "health", "tag", self.sort.things):
            self.resources.setdefault(name, [])
        self.resources.setdefault("qualityprofile", [quality_profile(1, "HD-1080p"), quality_profile(4, "Ultra-HD")])
        self.resources.setdefault("rootfolder", [root_folder(1, "/tv" if self.service == "sonarr" else "/movies")])

    @property
    def sort(self) -> Sort:
        return SORTS[self.service]

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def asked(self) -> list[Asked]:
        return self.server.asked

    @property
    def commands(self) -> list[Row]:
        """What it was told to do, the latest last: the body of each command."""
        return [json.loads(asked.body) for asked in self.asked if _is(asked, "POST", "command")]

    def rows(self, name: str) -> list[Row]:
        return self.resources[name]

    def row(self, name: str, row_id: int) -> Row | None:
        return next((row for row in self.rows(name) if row["id"] == row_id), None)

    def keep(self, name: str, row: Row) -> Row:
        """Put a row there, with the next id if it has none."""
        rows = self.resources.setdefault(name, [])
        kept = {**row, "id": row.get("id") or max((one["id"] for one in rows), default=0) + 1}
        rows.append(kept)
        return kept

    def __call__(self, asked: Asked) -> Reply:
        if not asked.path.startswith(API):
            return page(self.sort.title)
        if asked.headers.get("x-api-key") != KEY:
            return telling({"error": "Unauthorized"}, 401)
        body = json.loads(asked.body) if asked.body else None
        try:
            check_request(self.service, asked.method, asked.path, asked.query, body)
            reply = self._answer(asked, body)
            if reply.status < 300:
                check_answer(self.service, asked.path, json.loads(reply.body), asked.method)
        except (AssertionError, ValidationError, ValueError, LookupError) as error:
            self.complaints.append(f"{asked.method} {asked.path}: {error!r}")
            return telling({"message": self.complaints[-1]}, 500)
        return reply

    def _answer(self, asked: Asked, body: Any) -> Reply:
        end = asked.path.removeprefix(API)
        special = self._special(asked, end, body)
        if special is not None:
            return special
        name, _, last = end.rpartition("/")
        if end in self.resources:
            return self._whole(asked, end, body)
        if name in self.resources and last.isdigit() and int(last) <= ID_MAX:
            return self._one(asked, name, int(last), body)
        return telling({"message": "NotFound", "description": "There is nothing here."}, 404)

    def _special(self, asked: Asked, end: str, body: Any) -> Reply | None:
        """What is not just reading and writing rows."""
        answers: dict[tuple[str, str], Callable[[], Reply]] = {
            ("GET", "system/status"): lambda: telling(
                {"appName": self.sort.title, "version": self.sort.version, **ARR_STATUS}
            ),
            ("GET", f"{self.sort.things}/lookup"): lambda: telling(self._found(asked.query["term"])),
            ("POST", self.sort.things): lambda: self._add(body),
            ("POST", "command"): lambda: self._command(body),
            ("GET", "queue/details"): lambda: telling(self.rows("queue")),
            ("GET", "history/since"): lambda: telling(
                [row for row in self.rows("history") if row["date"] >= asked.query["date"]]
            ),
            ("DELETE", "queue/bulk"): lambda: self._leave_queue(asked, body["ids"]),
        }
        if (answer := answers.get((asked.method, end))) is not None:
            return answer()
        head, _, last = end.rpartition("/")
        if asked.method == "POST" and head == "history/failed" and self.row("history", int(last)):
            return self._mark_failed(int(last))
        if asked.method == "DELETE" and head == "queue" and last.isdigit() and self.row("queue", int(last)):
            return self._leave_queue(asked, [int(last)])
        return None

    def _whole(self, asked: Asked, name: str, body: Any) -> Reply:
        content = self.resources[name]
        if asked.method == "POST":
            return telling(self.keep(name, body), 201)
        if name in PAGED:
            return telling(_page(content, asked.query))
        if isinstance(content, list):
            content = [row for row in content if all(_like(row, one, asked.query[one]) for one in asked.query)]
        return telling(content)

    def _one(self, asked: Asked, name: str, row_id: int, body: Any) -> Reply:
        content = self.resources[name]
        if isinstance(content, dict):
            if asked.method == "PUT":
                content = self.resources[name] = body
            return telling(content, 202 if asked.method == "PUT" else 200)
        row = self.row(name, row_id)
        if row is None:
            kind = name.title()
            return telling({"message": f"{kind} with ID {row_id} does not exist"}, 404)
        if asked.method == "PUT":
            row.clear()
            row.update(body)
            return telling(row, 202)
        if asked.method == "DELETE":
            content.remove(row)
            return telling({})
        return telling(row)

    def _found(self, term: str) -> list[Row]:
        word, _, number = term.partition(":")
        outer, here = self.sort.outer_id, self.rows(self.sort.things)
        if word == self.sort.term and number.isdigit():
            found = [row for row in self.catalogue if row[outer] == int(number)]
        else:
            found = [row for row in self.catalogue if term.casefold() in row["title"].casefold()]
        ids = {row[outer]: {"id": row["id"]} for row in here}
        return [{**row, **ids.get(row[outer], {})} for row in found]

    def _add(self, body: Row) -> Reply:
        outer = self.sort.outer_id
        wrong: list[Row] = []
        if not self.row("qualityprofile", body.get("qualityProfileId", 0)):
            wrong.append(_refusal("QualityProfileId", "Quality Profile does not exist"))
        if not any(row["path"] == body.get("rootFolderPath") for row in self.rows("rootfolder")):
            wrong.append(_refusal("RootFolderPath", f"Root folder '{body.get('rootFolderPath')}' does not exist"))
        if any(row[outer] == body[outer] for row in self.rows(self.sort.things)):
            wrong.append(_refusal(outer[0].upper() + outer[1:], self.sort.added))
        if wrong:
            return telling(wrong, 400)
        folder = body.get("folder") or body["title"]
        row = {**body, "added": LONG_AGO, "path": f"{body['rootFolderPath']}/{folder}"}
        row.pop("addOptions", None)
        return telling(self.keep(self.sort.things, row), 201)

    def _command(self, body: Row) -> Reply:
        told = {"name": body["name"], "commandName": body["name"], "body": body, "status": "queued", "queued": LONG_AGO}
        return telling(self.keep("command", {**told, "trigger": "manual"}), 201)

    def _leave_queue(self, asked: Asked, ids: list[int]) -> Reply:
        for row in [row for row in self.rows("queue") if row["id"] in ids]:
            # A download goes whole, however many episodes it is.
            same = [one for one in self.rows("queue") if one["downloadId"] == row["downloadId"]]
            for one in same:
                self.rows("queue").remove(one)
            if asked.query.get("blocklist") == "true":
                for grab in [one for one in self.rows("history") if _grabbed(one, row["downloadId"])]:
                    self._mark_failed(grab["id"])
                kept = {name: row[name] for name in ("seriesId", "movieId", "protocol", "indexer") if name in row}
                self.keep("blocklist", {**kept, "sourceTitle": row["title"], "date": LONG_AGO})
        return telling({})

    def _mark_failed(self, row_id: int) -> Reply:
        grabbed = self.row("history", row_id)
        assert grabbed
        self.keep("history", {**grabbed, "id": 0, "eventType": "downloadFailed"})
        return telling({})


@asynccontextmanager
async def arr_standing_in(
    service: str, before: Callable[[Asked], Reply | None] = lambda asked: None, **resources: Any
) -> AsyncGenerator[ArrStandIn]:
    """A stand-in that listens. `before` may answer in its place, such as with a failure."""
    arr = ArrStandIn(service, resources)
    async with standing_in(lambda asked: before(asked) or arr(asked)) as server:
        arr.server = server
        yield arr
    assert arr.complaints == []


def quality_profile(row_id: int, name: str) -> Row:
    scores = {"minFormatScore": 0, "cutoffFormatScore": 10000, "minUpgradeFormatScore": 1}
    return {"id": row_id, "name": name, "upgradeAllowed": True, "cutoff": 7, "items": [], "formatItems": [], **scores}


def root_folder(row_id: int, path: str) -> Row:
    return {"id": row_id, "path": path, "accessible": True, "freeSpace": 10**12, "unmappedFolders": []}


def series(title: str, tvdb_id: int, year: int = 2008, **more: Any) -> Row:
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
        **more,
    }


def kept_series(title: str, tvdb_id: int, row_id: int, **more: Any) -> Row:
    """A series that has been added, and aired seven episodes."""
    counts = {"episodeFileCount": 7, "episodeCount": 7, "totalEpisodeCount": 7, "sizeOnDisk": 15360000000}
    statistics = {**counts, "releaseGroups": [], "percentOfEpisodes": 100}
    found = series(title, tvdb_id)
    first, *others = found["seasons"]
    return {
        **found,
        "id": row_id,
        "seasons": [first, *({**season, "statistics": statistics} for season in others)],
        "statistics": {**statistics, "seasonCount": len(others)},
        "monitored": True,
        "seasonFolder": True,
        "qualityProfileId": 1,
        "path": f"/tv/{title}",
        "added": LONG_AGO,
        **more,
    }


def movie(title: str, tmdb_id: int, year: int = 1999, **more: Any) -> Row:
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
        **more,
    }


def kept_movie(title: str, tmdb_id: int, row_id: int, **more: Any) -> Row:
    """A movie that has been added, and is there."""
    found, size = movie(title, tmdb_id), 8589934592
    quality = {"quality": {"id": 7, "name": "Bluray-1080p", "source": "bluray", "resolution": 1080}}
    file = {"id": row_id, "movieId": row_id, "relativePath": f"{title}.mkv", "size": size, "quality": quality}
    return {
        **found,
        "id": row_id,
        "monitored": True,
        "minimumAvailability": "released",
        "qualityProfileId": 1,
        "path": f"/movies/{found['folder']}",
        "hasFile": True,
        "sizeOnDisk": size,
        "movieFile": file,
        "added": LONG_AGO,
        **more,
    }


def queued(title: str, row_id: int, **more: Any) -> Row:
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
        **more,
    }


def _is(asked: Asked, method: str, end: str) -> bool:
    return (asked.method, asked.path) == (method, API + end)


def _grabbed(row: Row, download_id: str) -> bool:
    return row["eventType"] == "grabbed" and row.get("downloadId") == download_id


def _like(row: Row, name: str, wanted: str) -> bool:
    """Whether a row has this value, if it has such a field at all."""
    return name not in row or str(row[name]).casefold() == wanted.casefold()


def _page(rows: list[Row], query: dict[str, str]) -> Row:
    page, size = int(query.get("page", 1)), int(query.get("pageSize", 10))
    ordered = list(rows)
    if (key := query.get("sortKey")) is not None:
        ordered.sort(key=lambda row: row.get(key) or 0, reverse=query.get("sortDirection") == "descending")
    shown = ordered[(page - 1) * size : page * size]
    return {"page": page, "pageSize": size, "totalRecords": len(rows), "records": shown}


def _refusal(name: str, words: str) -> Row:
    return {"propertyName": name, "errorMessage": words, "severity": "error"}
