"""Check over HTTP whether the gateway and MLflow run. Nothing here joins Ray or opens the database."""

from typing import Any

import httpx

TIMEOUT_SECONDS = 5


def gateway_health(url: str) -> dict[str, Any] | None:
    """Return the content of the gateway's /health. None: no response, or one of another program."""
    try:
        response = httpx.get(f"{url}/health", timeout=TIMEOUT_SECONDS)
        content: Any = response.json()
    except (httpx.HTTPError, ValueError):
        return None
    return content if isinstance(content, dict) and {"status", "uptime"} <= content.keys() else None


def is_mlflow_up(uri: str) -> bool:
    """Whether MLflow answers. No credentials are sent, since this URL may have a masked password."""
    try:
        response = httpx.get(f"{uri}/health", auth=httpx.Auth(), timeout=TIMEOUT_SECONDS)
        return response.is_success or response.status_code == 401
    except httpx.HTTPError:
        return False
