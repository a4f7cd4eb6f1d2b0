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
    try:
        return httpx.get(f"{uri}/health", timeout=TIMEOUT_SECONDS).is_success
    except httpx.HTTPError:
        return False
