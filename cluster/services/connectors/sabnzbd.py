"""The connector of SABnzbd, which downloads from Usenet.

Every call is `/api?mode=…`, and an error may have the status 200.
"""

from typing import Any

from pydantic import Field

from cluster.services import tools
from cluster.services.connector import Connector
from cluster.services.errors import ErrorInResponse
from cluster.services.http.api_key import ApiKeyScheme
from cluster.services.http.client import Client
from cluster.services.sabnzbd import downloads as sabnzbd_downloads
from cluster.services.sabnzbd.download_tracking import DOWNLOAD_TRACKER
from cluster.services.sabnzbd.settings import SETTINGS_AREAS
from cluster.tools import Tool


async def health(client: Client) -> str:
    # `mode=version` would be answered without a key.
    response = client.require_keys(await client.get("/api", mode="queue", output="json", limit=1), "queue")
    return str(client.require_keys(response["queue"], "version")["version"])


def unwrap(response: Any) -> Any:
    if isinstance(response, dict) and response.get("status") is False and "error" in response:
        message = str(response["error"])
        raise ErrorInResponse(message, is_key_error="api key" in message.casefold())
    return response


class AddDownloadArguments(tools.Arguments):
    url: str = Field(pattern=r"^https?://\S+$", max_length=2000, description="URL of the NZB")
    name: str = Field(default="", max_length=200, description="Name of the download")
    category: str = Field(default="", max_length=100, description="Category, such as tv")


async def add_download(client: Client, arguments: AddDownloadArguments) -> dict[str, str]:
    return {"nzo_id": await sabnzbd_downloads.add(client, arguments.url, arguments.name, arguments.category)}


CONNECTOR = Connector(
    type="sabnzbd",
    title="SABnzbd",
    capabilities=frozenset({"health", "queue", "history", "add", "configure"}),
    health=health,
    key_scheme=ApiKeyScheme(query_parameter="apikey"),
    key_help="Config, General, Security: API Key.",
    unwrap=unwrap,
    tools=(
        *tools.download_tools(sabnzbd_downloads.DOWNLOADS),
        Tool("add_download", "Add a download by the URL of its NZB", AddDownloadArguments, add_download, "change"),
    ),
    downloads=sabnzbd_downloads.DOWNLOADS,
    download_tracker=DOWNLOAD_TRACKER,
    settings=SETTINGS_AREAS,
)
