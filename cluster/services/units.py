"""How people are told of bytes: 15.2 GB, in the units of 1024 that download programs use."""

UNITS = ("B", "KB", "MB", "GB", "TB", "PB")


def in_units(count: float) -> str:
    for unit in UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {UNITS[-1]}"
