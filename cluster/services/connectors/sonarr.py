"""The connector of Sonarr, which manages series."""

from cluster.services.arr import connector as arr_connector
from cluster.services.arr.download_tracking import download_tracker
from cluster.services.arr.series import SERIES
from cluster.services.arr.series_tools import TOOLS
from cluster.services.arr.settings import SERIES_AND_MOVIES_AREAS

CONNECTOR = arr_connector.connector(
    "sonarr",
    "Sonarr",
    "/api/v3",
    "queue",
    "history",
    "library",
    "add",
    "search",
    "configure",
    collection=SERIES,
    tools=TOOLS,
    download_tracker=download_tracker("series"),
    settings=SERIES_AND_MOVIES_AREAS,
)
