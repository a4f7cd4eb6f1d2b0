"""Have storage read its settings again."""

from typing import Any

from cluster import storage

_earlier: list[Any] = []


def forget_storage() -> None:
    """The next call reads the settings again.

    The file systems of before are kept: one of S3 that is collected as garbage would close its connections in whatever
    event loop runs then.
    """
    cached = storage._filesystem_and_root  # pyright: ignore[reportPrivateUsage]
    if cached.cache_info().currsize:
        _earlier.append(cached())
    cached.cache_clear()
