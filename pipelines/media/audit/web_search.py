"""What the web says of findings: pages for each, from a connected service that searches."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.db import Database
from cluster.secrets import SealBroken
from cluster.services import store as service_store
from cluster.services.catalog import find_connector
from cluster.services.errors import ServiceError
from cluster.services.selection import NothingConnected, choose
from pipelines.media.audit.evaluate import Finding
from pipelines.media.audit.rules import PRIORITIES

SEARCHES_MAX = 12
SOURCES_MAX = 3


@dataclass
class Advice:
    used: bool
    reason: str | None  # why it was not used, or not to its end
    searches: int = 0
    sources: dict[str, list[str]] = field(default_factory=dict[str, list[str]])  # addresses, by rule

    def as_told(self) -> dict[str, object]:
        return {"used": self.used, "reason": self.reason, "searches": self.searches}


async def search(database: Database, findings: Sequence[Finding]) -> Advice:
    """Look for pages about the weightiest findings."""
    try:
        async with database.reading() as session:
            service = await choose(session, lambda connector: connector.search_web, "searches the web")
    except NothingConnected as error:
        return Advice(False, error.message)
    search_web = service.connector.search_web
    if search_web is None:
        return Advice(False, f"{service.name} does not search the web.")
    rules = {finding.rule.id: finding.rule for finding in findings}
    weightiest = sorted(rules.values(), key=lambda rule: PRIORITIES.index(rule.priority))[:SEARCHES_MAX]
    advice = Advice(True, None)
    try:
        async with service_store.connected(database, service) as client:
            for rule in weightiest:
                title = find_connector(rule.service).title
                found = await search_web(client, f"{title} {rule.setting} recommended setting")
                advice.searches += 1
                advice.sources[rule.id] = [source.url for source in found[:SOURCES_MAX]]
    except (ServiceError, SealBroken) as error:
        advice.used, advice.reason = bool(advice.sources), error.message
    return advice
