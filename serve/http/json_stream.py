"""Sends a list that may be too long for memory: it is written to a file first, and sent when it is complete.

So an error in the middle is an error response, and not half a response with status 200.
"""

from collections.abc import Awaitable, Callable, Iterator
from tempfile import SpooledTemporaryFile

from pydantic import BaseModel
from starlette.responses import StreamingResponse

MEMORY_BYTES = 1024 * 1024
PART_BYTES = 64 * 1024

AddItem = Callable[[BaseModel], None]


async def spooled_list_response(name: str, add_items: Callable[[AddItem], Awaitable[int]]) -> StreamingResponse:
    """A response `{name: […], "total": …}`. `add_items` adds each item, and returns the total."""
    file = SpooledTemporaryFile[bytes](max_size=MEMORY_BYTES)
    separator = b""

    def add(row: BaseModel) -> None:
        nonlocal separator
        file.write(separator + row.model_dump_json().encode())
        separator = b","

    try:
        file.write(b'{"%s":[' % name.encode())
        total = await add_items(add)
        file.write(b'],"total":%d}' % total)
    except BaseException:
        file.close()
        raise
    length = file.tell()
    file.seek(0)
    return StreamingResponse(_parts(file), 200, {"Content-Length": str(length)}, "application/json")


def _parts(file: SpooledTemporaryFile[bytes]) -> Iterator[bytes]:
    with file:
        while part := file.read(PART_BYTES):
            yield part
