"""The WebSockets /ws/{client_id} (with rooms), /ws/training/{training_id}, /ws/system, /ws/metrics and /ws/logs."""

import re
from typing import Annotated, Any

from fastapi import APIRouter, Path, WebSocket

from cluster.db import get_database
from cluster.errors import NotFound
from cluster.ownership import Principal
from jobs import queue
from serve.realtime.hub import BROADCAST_ROOM, Hub, Message, Subscription, error_message, serve_socket
from serve.security.callers import AdminSocketCaller, SocketCaller
from serve.training.sessions import training_status

router = APIRouter()

ROOMS = frozenset({"config_audit", "downloads", "content_requests", "system"})
ADMIN_ROOMS = frozenset({"jobs"})
JOB_ROOM = re.compile(r"job:([\w-]{1,64})", re.ASCII)
MAX_ROOMS = 100


@router.websocket("/ws/system")
async def system(socket: WebSocket, caller: SocketCaller) -> None:
    """Send a sample of this machine's load every two seconds."""
    await _listen_only(socket, socket.app.state.system_hub)


@router.websocket("/ws/metrics")
async def metrics(socket: WebSocket, caller: SocketCaller) -> None:
    """Send the values of all servers whenever they are measured."""
    await socket.app.state.server_socket.serve(socket)


@router.websocket("/ws/logs")
async def log_lines(socket: WebSocket, caller: AdminSocketCaller) -> None:
    """Send the log lines of the components as they are written."""
    await _listen_only(socket, socket.app.state.log_hub)


@router.websocket("/ws/training/{training_id}")
async def training(socket: WebSocket, caller: SocketCaller, training_id: Annotated[str, Path(max_length=40)]) -> None:
    """Send the status of a training, now and after each change. The id is that of its session or its job."""
    await training_status(training_id, caller)  # raises if there is none
    async with socket.app.state.hub.subscribe([f"training:{training_id}"]) as subscription:

        async def current_status(_: Message) -> Message:
            needed_rooms, status = await training_status(training_id, caller)
            if missing_rooms := needed_rooms - subscription.rooms:
                for room in missing_rooms:
                    subscription.join(room)
                # Messages in these rooms before this moment were missed, so read the status again.
                status = (await training_status(training_id, caller))[1]
            return status.model_dump()

        await socket.accept()
        subscription.put({"rooms": []})
        await serve_socket(socket, subscription, _refuse_message, current_status)


@router.websocket("/ws/{client_id}")
async def rooms(socket: WebSocket, caller: SocketCaller, client_id: Annotated[str, Path(max_length=128)]) -> None:
    """Send the live messages of the rooms that the client joins."""
    async with socket.app.state.hub.subscribe(()) as subscription:

        async def on_message(message: dict[str, Any]) -> Message:
            return await _change_rooms(subscription, caller, message)

        await socket.accept()
        await serve_socket(socket, subscription, on_message)


async def may_join(caller: Principal, room: str) -> bool:
    """Whether the room exists, and the caller may join it."""
    if room in ROOMS:
        return True
    if room in ADMIN_ROOMS:
        return caller.is_admin
    job = JOB_ROOM.fullmatch(room)
    return job is not None and await _can_see_job(caller, job[1])


async def _change_rooms(subscription: Subscription, caller: Principal, message: dict[str, Any]) -> Message:
    action, room = message.get("type"), message.get("room")
    if action not in ("join_room", "leave_room"):  # no set: the client may send an unhashable value
        return error_message("A message's type is join_room, leave_room or ping.")
    if not isinstance(room, str):
        return error_message("The name of the room is missing: send it as 'room'.")
    if action == "leave_room":
        if room != BROADCAST_ROOM:
            subscription.leave(room)
        return {"type": "room_left", "room": room}
    if len(subscription.rooms) > MAX_ROOMS:
        return error_message(f"One connection may be in {MAX_ROOMS} rooms.")
    if not await may_join(caller, room):
        return error_message("There is no such room, or you may not join it.")
    subscription.join(room)
    return {"type": "room_joined", "room": room}


async def _can_see_job(caller: Principal, job_id: str) -> bool:
    try:
        async with get_database().read_transaction() as session:
            await queue.get(session, job_id, caller)
    except NotFound:
        return False
    return True


async def _listen_only(socket: WebSocket, hub: Hub) -> None:
    async with hub.subscribe(()) as subscription:
        await socket.accept()
        await serve_socket(socket, subscription, _refuse_message)


async def _refuse_message(message: dict[str, Any]) -> Message:
    return error_message("This connection accepts no messages but ping.")
