"""The connector of Ollama, which runs language models."""

from pydantic import BaseModel

from cluster.services.connector import Connector
from cluster.services.http.api_key import ApiKeyScheme
from cluster.services.http.client import Client
from cluster.tools import Arguments, Tool


async def health(client: Client) -> str:
    version_info = client.require_keys(await client.get("/api/version"), "version")
    client.require_keys(await client.get("/api/tags"), "models")  # other programs have /api/version too
    return str(version_info["version"])


class Model(BaseModel):
    name: str
    size: int | None = None


class Models(BaseModel):
    models: list[Model]


async def get_models(client: Client, _: Arguments) -> list[Model]:
    return client.parse(Models, await client.get("/api/tags")).models


CONNECTOR = Connector(
    type="ollama",
    title="Ollama",
    capabilities=frozenset({"health", "models"}),
    health=health,
    key_scheme=ApiKeyScheme(header="Authorization", template="Bearer {}", required=False),
    key_help="Only behind a proxy that requires one.",
    tools=(Tool("get_models", "List the models, with their sizes in bytes", Arguments, get_models),),
)
