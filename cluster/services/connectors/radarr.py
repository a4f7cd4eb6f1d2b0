"""Radarr: movies."""

from cluster.services.arr import connector as arr_connector
from cluster.services.arr.download_tracking import following
from cluster.services.arr.movies import MOVIES
from cluster.services.arr.movies_tools import TOOLS
from cluster.services.arr.settings import OF_SERIES_AND_MOVIES

CONNECTOR = arr_connector.connector(
    "radarr",
    "Radarr",
    "/api/v3",
    "queue",
    "history",
    "library",
    "add",
    "search",
    "configure",
    collection=MOVIES,
    tools=TOOLS,
    following=following("movie"),
    settings=OF_SERIES_AND_MOVIES,
)
