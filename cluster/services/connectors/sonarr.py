"""Sonarr: series."""

from cluster.services.arr import connector as arr_connector
from cluster.services.arr.download_tracking import following
from cluster.services.arr.series import SERIES
from cluster.services.arr.series_tools import TOOLS
from cluster.services.arr.settings import OF_SERIES_AND_MOVIES

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
    following=following("series"),
    settings=OF_SERIES_AND_MOVIES,
)
