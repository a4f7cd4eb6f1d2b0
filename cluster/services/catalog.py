"""The catalog of connectors: it loads the module of each type of service from `cluster/services/connectors/`."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from cluster.errors import UnprocessableRequest
from cluster.services import connectors
from cluster.services.connector import Connector


class UnknownServiceType(UnprocessableRequest):
    """There is no such type of service."""

    code = "UNKNOWN_SERVICE_TYPE"


@cache
def all_connectors() -> dict[str, Connector]:
    """Return all connectors by type."""
    modules = (import_module(f"{connectors.__name__}.{module.name}") for module in iter_modules(connectors.__path__))
    loaded: list[Connector] = [module.CONNECTOR for module in modules]
    return {connector.type: connector for connector in loaded}


@cache
def connectors_by_name() -> dict[str, Connector]:
    """Return all connectors by type and by alias."""
    return {name: connector for connector in all_connectors().values() for name in connector.names}


def find_connector(name: str) -> Connector:
    connector = connectors_by_name().get(name.casefold())
    if connector is None:
        raise UnknownServiceType(
            f"There is no type of service named '{name}'. There are: {', '.join(sorted(connectors_by_name()))}."
        )
    return connector
