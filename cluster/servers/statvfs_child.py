"""A program: it answers with the numbers of the file system of each path that it reads, a JSON document a line.

`statvfs` never returns for a mount whose server is gone, in whatever thread, and whatever timeout is around it. Only a
process can be ended. It imports as little as possible, since it is started again after each mount that hangs.
"""

import json
import os
import sys

for line in sys.stdin:
    try:
        numbers = os.statvfs(json.loads(line))
    except OSError as error:
        answer: dict[str, object] = {"error": error.strerror}
    else:
        block = numbers.f_frsize
        answer = {
            "total": numbers.f_blocks * block,
            "used": (numbers.f_blocks - numbers.f_bfree) * block,
            "available": numbers.f_bavail * block,
        }
    print(json.dumps(answer), flush=True)  # noqa: T201
