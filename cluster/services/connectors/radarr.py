"""The connector of Radarr, which manages movies."""

from cluster.services.arr import connector as arr_connector
from cluster.services.arr.download_tracking import download_tracker
from cluster.services.arr.movies import MOVIES
from cluster.services.arr.movies_tools import TOOLS
from cluster.services.arr.settings import SERIES_AND_MOVIES_AREAS

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
    download_tracker=download_tracker("movie"),
    settings=SERIES_AND_MOVIES_AREAS,
)
