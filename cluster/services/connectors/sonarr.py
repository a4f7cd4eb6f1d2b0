"""Sonarr: series."""

from cluster.services import arr
from cluster.services.arr_areas import OF_SERIES_AND_MOVIES
from cluster.services.arr_following import following
from cluster.services.series import SERIES
from cluster.services.series_tools import TOOLS

CONNECTOR = arr.connector(
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
