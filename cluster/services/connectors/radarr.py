"""Radarr: movies."""

from cluster.services import arr
from cluster.services.arr_areas import OF_SERIES_AND_MOVIES
from cluster.services.arr_following import following
from cluster.services.movies import MOVIES
from cluster.services.movies_tools import TOOLS

CONNECTOR = arr.connector(
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
