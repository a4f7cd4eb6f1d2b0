"""Ollama: language models on another machine."""

from pydantic import BaseModel

from cluster.services.connector import Connector, Tool
from cluster.services.http.api_key import Key
from cluster.services.http.client import Client
from cluster.services.tools import Arguments


async def health(client: Client) -> str:
    told = client.expect(await client.get("/api/version"), "version")
    client.expect(await client.get("/api/tags"), "models")  # others have a version too
    return str(told["version"])


class Model(BaseModel):
    name: str
    size: int | None = None


class Models(BaseModel):
    models: list[Model]


async def get_models(client: Client, _: Arguments) -> list[Model]:
    return client.read(Models, await client.get("/api/tags")).models


CONNECTOR = Connector(
    type="ollama",
    title="Ollama",
    capabilities=frozenset({"health", "models"}),
    health=health,
    key=Key(header="Authorization", form="Bearer {}", needed=False),
    key_help="Only behind a proxy that wants one.",
    tools=(Tool("get_models", "List the models, with their sizes in bytes", Arguments, get_models),),
)
