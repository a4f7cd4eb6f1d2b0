"""The processes that train together. Whatever one of them decides, all must, or they wait for each other for good."""

import torch
from torch import distributed


def is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def all_reduce_and(flag: bool) -> bool:
    """Whether every process wishes it."""
    if not is_distributed():
        return flag
    flags = torch.tensor([flag], dtype=torch.uint8, device=_device())
    distributed.all_reduce(flags, op=distributed.ReduceOp.MIN)
    return bool(flags[0])


def broadcast_flags(*flags: bool) -> list[bool]:
    """What the first process wishes."""
    if not is_distributed():
        return list(flags)
    tensor = torch.tensor(flags, dtype=torch.uint8, device=_device())
    distributed.broadcast(tensor, src=0)
    return [bool(flag) for flag in tensor]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
