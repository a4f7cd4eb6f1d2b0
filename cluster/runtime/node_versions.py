"""Find the nodes of a joined Ray cluster that have another version of Forgearr, so that nothing of ours runs there."""

import logging
from importlib.metadata import version
from typing import Any

from cluster.errors import Unavailable

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_SECONDS = 60
NONE = "none"


class OtherVersion(Unavailable):
    """A node of the cluster has another version of Forgearr."""

    code = "OTHER_VERSION"
    retryable = False


class NodeVersions:
    """The versions on the nodes of the cluster. Each node is asked once: it keeps what it has while it lives."""

    def __init__(self) -> None:
        self._versions: dict[str, str] = {}  # by the id of the node

    def refresh(self) -> set[str]:
        """Ask the nodes that have joined since the last time. Returns the ids of all nodes to avoid."""
        import ray

        nodes: list[dict[str, Any]] = ray.nodes()
        alive = {node["NodeID"]: node["NodeName"] for node in nodes if node["Alive"]}
        self._versions = {node: known for node, known in self._versions.items() if node in alive}
        for node, answer in {node: _ask(node) for node in alive if node not in self._versions}.items():
            found = _result(answer)
            if found is None:
                continue  # it is asked again; until then its processes check for themselves
            self._versions[node] = found
            if found != version("forgearr"):
                log.warning("%s", _description(alive[node], found))
        return {node for node, known in self._versions.items() if known != version("forgearr")}

    def require_same(self) -> None:
        """Raise OtherVersion if a node has another version."""
        if others := self.refresh():
            import ray

            names = {node["NodeID"]: node["NodeName"] for node in ray.nodes()}
            raise OtherVersion(_description(names[min(others)], self._versions[min(others)]))


def installed_version() -> str:
    """Return the version on the node where it runs."""
    return version("forgearr")


def _ask(node_id: str) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(installed_version)
    return task.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote()


def _result(answer: Any) -> str | None:
    """Return the answer of a node. None: it did not answer, or has left."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    try:
        return ray.get(answer, timeout=ANSWER_TIMEOUT_SECONDS)
    except RayTaskError:  # it does not know this module
        return NONE
    except (GetTimeoutError, RayError):
        return None


def _description(name: str, found: str) -> str:
    has = "no Forgearr of this version" if found == NONE else f"Forgearr {found}"
    return (
        f"The node {name} has {has}, and this installation {version('forgearr')}: install the same version there and "
        "restart its Ray, or remove the node from the cluster."
    )
