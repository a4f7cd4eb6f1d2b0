"""Look up Forgearr's named Ray actors from any process of the cluster."""

import sys
from typing import Any

from cluster.errors import Unavailable
from cluster.settings import get_settings

_handles: dict[str, Any] = {}


def has_joined() -> bool:
    """Whether this process is part of a Ray cluster."""
    ray: Any = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def find_actor(name: str) -> Any:
    """Return the handle of a named actor. Handles are cached: they stay valid when Ray restarts the actor."""
    # In a process that has not joined Ray, `get_actor` would start a new cluster.
    if not has_joined():
        raise Unavailable(f"This process is not part of the cluster, so it cannot reach the {name}.")
    if name not in _handles:
        import ray

        try:
            _handles[name] = ray.get_actor(name, namespace=get_settings().ray_namespace)
        except ValueError as error:
            raise Unavailable(f"The {name} is not running; `forgearr status` shows all components.") from error
    return _handles[name]


def forget_actor(name: str) -> None:
    """Drop the cached handle of an actor that was replaced by another one of the same name."""
    _handles.pop(name, None)
