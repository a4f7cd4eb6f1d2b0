"""WebSockets: /ws/{client_id} with its rooms, /ws/system and /ws/logs."""

import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, WebSocket

from cluster.db import get_database
from cluster.errors import Forbidden, NotFound
from jobs import queue
from serve.realtime.hub import EVERYBODY, Hub, Message, Subscription, converse, refusal
from serve.security.callers import Caller, authenticate, owner_of
from serve.training.sessions import training_now

router = APIRouter()

ROOMS = frozenset({"config_audit", "downloads", "content_requests", "system"})
ADMIN_ROOMS = frozenset({"jobs"})
JOB_ROOM = re.compile(r"job:([\w-]{1,64})", re.ASCII)
MAX_ROOMS = 100

SocketCaller = Annotated[Caller, Depends(authenticate)]


@router.websocket("/ws/system")
async def system(socket: WebSocket, caller: SocketCaller) -> None:
    """What this machine is doing, every two seconds."""
    await _listen_only(socket, socket.app.state.system_hub)


@router.websocket("/ws/logs")
async def log_lines(socket: WebSocket, caller: SocketCaller) -> None:
    """What the components log, as they do."""
    if not caller.is_admin:
        raise Forbidden("Only an administrator may read the logs.")
    await _listen_only(socket, socket.app.state.log_hub)


@router.websocket("/ws/training/{training_id}")
async def training(socket: WebSocket, caller: SocketCaller, training_id: Annotated[str, Path(max_length=40)]) -> None:
    """How a training goes: at once, and whenever it gets further. It is named by its session, or by its job."""
    await training_now(training_id, caller)  # refuses what there is not
    async with socket.app.state.hub.subscribe([f"training:{training_id}"]) as subscription:

        async def tell(_: Message) -> Message:
            concerned, status = await training_now(training_id, caller)
            if unjoined := concerned - subscription.rooms:
                for room in unjoined:
                    subscription.join(room)
                # Of what was said in there just before, nobody has told us.
                status = (await training_now(training_id, caller))[1]
            return status.model_dump()

        await socket.accept()
        subscription.put({"rooms": []})
        await converse(socket, subscription, _nothing_to_say, tell)


@router.websocket("/ws/{client_id}")
async def rooms(socket: WebSocket, caller: SocketCaller, client_id: Annotated[str, Path(max_length=128)]) -> None:
    """Whatever happens in the rooms that the client joins."""
    async with socket.app.state.hub.subscribe(()) as subscription:

        async def answer(said: dict[str, Any]) -> Message:
            return await _change_rooms(subscription, caller, said)

        await socket.accept()
        await converse(socket, subscription, answer)


async def may_join(caller: Caller, room: str) -> bool:
    """Whether there is such a room, and it is open to this caller."""
    if room in ROOMS:
        return True
    if room in ADMIN_ROOMS:
        return caller.is_admin
    job = JOB_ROOM.fullmatch(room)
    return job is not None and await _may_see(caller, job[1])


async def _change_rooms(subscription: Subscription, caller: Caller, said: dict[str, Any]) -> Message:
    action, room = said.get("type"), said.get("room")
    if action not in ("join_room", "leave_room"):  # it may be anything, and not everything can be in a set
        return refusal("A message's type is join_room, leave_room or ping.")
    if not isinstance(room, str):
        return refusal("Name the room: a text under 'room'.")
    if action == "leave_room":
        if room != EVERYBODY:
            subscription.leave(room)
        return {"type": "room_left", "room": room}
    if len(subscription.rooms) > MAX_ROOMS:
        return refusal(f"One connection may be in {MAX_ROOMS} rooms.")
    if not await may_join(caller, room):
        return refusal("There is no such room, or it is not open to you.")
    subscription.join(room)
    return {"type": "room_joined", "room": room}


async def _may_see(caller: Caller, job_id: str) -> bool:
    try:
        async with get_database().reading() as session:
            await queue.get(session, job_id, owner_of(caller))
    except NotFound:
        return False
    return True


async def _listen_only(socket: WebSocket, hub: Hub) -> None:
    async with hub.subscribe(()) as subscription:
        await socket.accept()
        await converse(socket, subscription, _nothing_to_say)


async def _nothing_to_say(said: dict[str, Any]) -> Message:
    return refusal("This connection only tells; it answers a ping.")
