"""The whole application on a real server on loopback, in this process."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from serve.app import create_app
from serve.engines.local.engine import LocalEngine


@asynccontextmanager
async def running_app(app: FastAPI | None = None) -> AsyncGenerator[str]:
    """Run a server during the block; yields `127.0.0.1:PORT`."""
    app = app or create_app()
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
    # asyncio sets TCP_NODELAY only on sockets whose protocol is TCP.
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    running = asyncio.create_task(server.serve([listener]))
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await running
        if isinstance(app.state.engine, LocalEngine):
            await unload_models(app.state.engine)


async def unload_models(engine: LocalEngine[Any]) -> None:
    """Free the memory and the threads of all loaded models."""
    for model in engine.loaded_models:
        await engine.unload(model.reference)
