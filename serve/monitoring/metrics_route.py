"""The route /metrics, which Prometheus scrapes."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from serve.http.marks import access

router = APIRouter()


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus text"}},
)
@access("public")
async def metrics(request: Request) -> Response:
    """Get all metrics: requests of all replicas, the queue, downloads and recoveries."""
    return Response(await request.app.state.metrics.render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
