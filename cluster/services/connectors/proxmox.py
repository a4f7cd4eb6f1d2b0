"""Proxmox VE: the virtual machines. Its certificate is its own, as a rule: `verify_tls` is false then."""

from typing import Any

from cluster.services.base import Connector, Key
from cluster.services.client import Client


async def health(client: Client) -> str:
    told = client.expect(await client.get("/api2/json/version"), "version", "repoid")
    return str(told["version"])


def unwrap(answer: Any) -> Any:
    return answer["data"] if isinstance(answer, dict) and "data" in answer else answer


CONNECTOR = Connector(
    type="proxmox",
    title="Proxmox",
    aliases=("pve",),
    capabilities=frozenset({"health", "machines", "metrics"}),
    health=health,
    key=Key(header="Authorization", form="PVEAPIToken={}"),
    key_help="Datacenter, Permissions, API Tokens: USER@REALM!TOKENID=SECRET.",
    unwrap=unwrap,
)
