"""Tools that all services with the same capability share: downloads, libraries."""

from typing import Annotated, Any

from pydantic import Field

from cluster.services.capabilities.downloads import DownloadHistory, DownloadQueue, Downloads, QueuePauseState
from cluster.services.capabilities.library import Libraries, Library, RecentlyAdded
from cluster.services.http.client import Client
from cluster.tools import Arguments, Tool


class LimitArguments(Arguments):
    limit: Annotated[int, Field(ge=1, le=500)] = Field(default=50, description="Maximum items to return")


class DownloadArguments(Arguments):
    nzo_id: Annotated[str, Field(min_length=1, max_length=100)] = Field(description="Id of the download")


class DeleteDownloadArguments(DownloadArguments):
    delete_files: bool = Field(default=True, description="Also delete what was downloaded so far")


class LibraryArguments(Arguments):
    library_key: Annotated[str, Field(min_length=1, max_length=100)] = Field(description="Key of the library")


def tool_parameters(tool: Tool[Any]) -> dict[str, dict[str, Any]]:
    """Return the parameters of a tool by name, each with `type`, `description`, and `default` or `required`."""
    schema = tool.input_schema
    required = schema.get("required", [])
    return {
        name: _parameter(property_schema, name in required)
        for name, property_schema in schema.get("properties", {}).items()
    }


def download_tools(downloads: Downloads) -> tuple[Tool[Client], ...]:
    async def get_queue(client: Client, _: Arguments) -> Any:
        return await downloads.queue(client)

    async def get_history(client: Client, arguments: LimitArguments) -> Any:
        return await downloads.history(client, arguments.limit)

    async def retry_download(client: Client, arguments: DownloadArguments) -> Any:
        return {"nzo_id": arguments.nzo_id, "new_nzo_id": await downloads.retry(client, arguments.nzo_id)}

    async def pause_queue(client: Client, _: Arguments) -> Any:
        return await downloads.pause(client)

    async def resume_queue(client: Client, _: Arguments) -> Any:
        return await downloads.resume(client)

    async def delete_download(client: Client, arguments: DeleteDownloadArguments) -> Any:
        await downloads.delete(client, arguments.nzo_id, arguments.delete_files)
        return {"nzo_id": arguments.nzo_id}

    return (
        Tool("get_queue", "Get current download queue", Arguments, get_queue, result=DownloadQueue),
        Tool("get_history", "Get download history", LimitArguments, get_history, result=DownloadHistory),
        Tool("retry_download", "Retry a failed download", DownloadArguments, retry_download, "change"),
        Tool("pause_queue", "Pause the download queue", Arguments, pause_queue, "change", QueuePauseState),
        Tool("resume_queue", "Resume the download queue", Arguments, resume_queue, "change", QueuePauseState),
        Tool(
            "delete_download", "Delete a download from the queue", DeleteDownloadArguments, delete_download, "destroy"
        ),
    )


def library_tools(library: Library) -> tuple[Tool[Client], ...]:
    async def get_libraries(client: Client, _: Arguments) -> Any:
        return await library.libraries(client)

    async def get_recently_added(client: Client, arguments: LimitArguments) -> Any:
        return await library.recently_added(client, arguments.limit)

    async def scan_library(client: Client, arguments: LibraryArguments) -> Any:
        return {"library": await library.scan(client, arguments.library_key)}

    return (
        Tool(
            "get_libraries",
            "List the libraries, with the number of items in each",
            Arguments,
            get_libraries,
            result=Libraries,
        ),
        Tool(
            "get_recently_added",
            "List the items that were added last",
            LimitArguments,
            get_recently_added,
            result=RecentlyAdded,
        ),
        Tool("scan_library", "Scan a library for new files", LibraryArguments, scan_library, "change"),
    )


def _parameter(property_schema: dict[str, Any], required: bool) -> dict[str, Any]:
    fields = {name: value for name, value in property_schema.items() if name not in {"title", "anyOf"}}
    # A parameter that may be null may also be omitted, so null is not listed as a type.
    choices = [choice for choice in property_schema.get("anyOf", []) if choice.get("type") != "null"]
    fields |= choices[0] if len(choices) == 1 else {"anyOf": choices} if choices else {}
    return {**fields, "required": True} if required else fields
