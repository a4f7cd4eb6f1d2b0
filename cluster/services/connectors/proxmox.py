"""The connector of Proxmox VE, which runs virtual machines. Its certificate is usually self-signed (`verify_tls`)."""

from typing import Any

from pydantic import BaseModel, Field

from cluster.services.connector import Connector
from cluster.services.http.api_key import ApiKeyScheme
from cluster.services.http.client import Client
from cluster.tools import Arguments, Tool


async def health(client: Client) -> str:
    version_info = client.require_keys(await client.get("/api2/json/version"), "version", "repoid")
    return str(version_info["version"])


def unwrap(response: Any) -> Any:
    return response["data"] if isinstance(response, dict) and "data" in response else response


class Machine(BaseModel):
    vmid: int
    name: str | None = None
    node: str
    type: str
    status: str
    cpu: float | None = Field(default=None, description="Share of its processors in use, from 0 to 1.")
    maxcpu: float | None = None
    mem: int | None = None
    maxmem: int | None = None
    uptime: int | None = None


async def get_machines(client: Client, _: Arguments) -> list[Machine]:
    return client.parse(list[Machine], await client.get("/api2/json/cluster/resources", type="vm"))


CONNECTOR = Connector(
    type="proxmox",
    title="Proxmox",
    aliases=("pve",),
    capabilities=frozenset({"health", "machines"}),
    health=health,
    key_scheme=ApiKeyScheme(header="Authorization", template="PVEAPIToken={}"),
    key_help="Datacenter, Permissions, API Tokens: USER@REALM!TOKENID=SECRET.",
    unwrap=unwrap,
    tools=(Tool("get_machines", "List virtual machines and containers", Arguments, get_machines),),
)
