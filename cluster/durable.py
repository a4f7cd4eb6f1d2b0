"""Files and folders that outlast a power cut.

A file gets its name when its content is on the disk. After a power cut, the name has the whole file, or what it had
before.
"""

import errno
import os
from pathlib import Path


def publish(draft: Path, target: Path) -> None:
    """Give a finished file, or a folder with its contents, its name."""
    for path in (draft, *draft.rglob("*")):
        sync(path)
    draft.replace(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot do it for folders. They send names to their server at once.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
