"""The route /metrics, which Prometheus scrapes."""

import logging

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric

from cluster.errors import Unavailable
from serve.http.marks import access
from serve.security.callers import find_known_caller
from serve.servers.metrics import server_families

router = APIRouter()

logger = logging.getLogger(__name__)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus text"}},
)
@access("public")
async def metrics(request: Request) -> Response:
    """Get all metrics: requests of all replicas, the queue, downloads, recoveries and servers.

    The metrics of single services and servers need a credential.
    """
    is_known = await find_known_caller(request) is not None
    servers = await _server_families(request) if is_known else []
    content = await request.app.state.metrics.render(servers, with_services=is_known)
    return Response(content, media_type=CONTENT_TYPE_PLAIN_0_0_4)


async def _server_families(request: Request) -> list[Metric]:
    try:
        return server_families(await request.app.state.servers.current())
    except Unavailable as error:
        logger.warning("The metrics of servers are missing: %s", error)
        return []
