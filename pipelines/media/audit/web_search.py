"""Search the web for pages about findings, through a connected search service."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.db import Database
from cluster.secrets import SealBroken
from cluster.services import store as service_store
from cluster.services.catalog import find_connector
from cluster.services.errors import ServiceError
from cluster.services.selection import NoServiceConnected, choose_service
from pipelines.media.audit.evaluate import Finding
from pipelines.media.audit.rules import PRIORITIES

MAX_SEARCHES = 12
MAX_SOURCES = 3


@dataclass
class WebSearchResult:
    used: bool
    reason: str | None  # why it was not used, or not finished
    searches: int = 0
    sources: dict[str, list[str]] = field(default_factory=dict[str, list[str]])  # URLs, by rule

    def to_dict(self) -> dict[str, object]:
        return {"used": self.used, "reason": self.reason, "searches": self.searches}


async def search(database: Database, findings: Sequence[Finding]) -> WebSearchResult:
    """Search for pages about the findings with the highest priorities."""
    try:
        async with database.read_transaction() as session:
            service = await choose_service(session, lambda connector: connector.search_web, "searches the web")
    except NoServiceConnected as error:
        return WebSearchResult(False, error.message)
    search_web = service.connector.search_web
    if search_web is None:
        return WebSearchResult(False, f"{service.name} does not search the web.")
    rules = {finding.rule.id: finding.rule for finding in findings}
    most_important = sorted(rules.values(), key=lambda rule: PRIORITIES.index(rule.priority))[:MAX_SEARCHES]
    result = WebSearchResult(True, None)
    try:
        async with service_store.open_client(database, service) as client:
            for rule in most_important:
                title = find_connector(rule.service).title
                pages = await search_web(client, f"{title} {rule.setting} recommended setting")
                result.searches += 1
                result.sources[rule.id] = [source.url for source in pages[:MAX_SOURCES]]
    except (ServiceError, SealBroken) as error:
        result.used, result.reason = bool(result.sources), error.message
    return result
