"""The connector of Plex, a media server."""

from cluster.services import tools
from cluster.services.connector import Connector
from cluster.services.http.api_key import ApiKeyScheme
from cluster.services.http.client import Client
from cluster.services.plex.library import LIBRARY
from cluster.services.plex.settings import SETTINGS_AREAS


async def health(client: Client) -> str:
    # /identity would be answered without a token.
    response = client.require_keys(await client.get("/"), "MediaContainer")
    return str(client.require_keys(response["MediaContainer"], "machineIdentifier", "version")["version"])


CONNECTOR = Connector(
    type="plex",
    title="Plex",
    capabilities=frozenset({"health", "library", "configure"}),
    health=health,
    key_scheme=ApiKeyScheme(header="X-Plex-Token"),
    key_help="The X-Plex-Token of the server's owner: Get Info, View XML of any item shows it in the URL.",
    tools=tools.library_tools(LIBRARY),
    library=LIBRARY,
    settings=SETTINGS_AREAS,
)
