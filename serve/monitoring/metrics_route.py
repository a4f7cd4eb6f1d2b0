"""The route /metrics, which Prometheus scrapes."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from serve.http.marks import access
from serve.security.callers import find_known_caller

router = APIRouter()


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus text"}},
)
@access("public")
async def metrics(request: Request) -> Response:
    """Get all metrics: requests of all replicas, the queue, downloads and recoveries.

    The metrics of single services need a credential.
    """
    is_known = await find_known_caller(request) is not None
    content = await request.app.state.metrics.render(with_services=is_known)
    return Response(content, media_type=CONTENT_TYPE_PLAIN_0_0_4)
