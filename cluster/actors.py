"""Forgearr's named Ray actors: how any process of the cluster finds one."""

import sys
from typing import Any

from cluster.errors import Unavailable

NAMESPACE = "forgearr"

_handles: dict[str, Any] = {}


def find_actor(name: str) -> Any:
    """The handle of a named actor. It stays good when Ray restarts that actor, so it is looked up once."""
    # A process that has not joined Ray must not do so by the way: Ray would start a cluster of its own for it.
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        raise Unavailable(f"This process is not part of the cluster and cannot reach the {name}.")
    if name not in _handles:
        try:
            _handles[name] = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError as error:
            raise Unavailable(f"The {name} is not running; `forgearr status` shows what is.") from error
    return _handles[name]


def forget_actor(name: str) -> None:
    """Look the actor up again next time: it was replaced by another one of the same name."""
    _handles.pop(name, None)
