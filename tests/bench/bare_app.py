"""The same no-op route in the smallest FastAPI application there is: what the gateway is measured against."""

from fastapi import FastAPI
from pydantic import BaseModel

app = FastAPI()


class Pong(BaseModel):
    pong: bool


@app.get("/api/v1/ping")
async def ping() -> Pong:
    return Pong(pong=True)
