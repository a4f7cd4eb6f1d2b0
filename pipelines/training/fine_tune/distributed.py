"""Common decisions of the processes of a distributed training. One that decided alone would block the others."""

import torch
from torch import distributed


def is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def all_reduce_and(flag: bool) -> bool:
    """Whether the flag is set in every process."""
    if not is_distributed():
        return flag
    flags = torch.tensor([flag], dtype=torch.uint8, device=_device())
    distributed.all_reduce(flags, op=distributed.ReduceOp.MIN)
    return bool(flags[0])


def broadcast_flags(*flags: bool) -> list[bool]:
    """The flags of the first process."""
    if not is_distributed():
        return list(flags)
    tensor = torch.tensor(flags, dtype=torch.uint8, device=_device())
    distributed.broadcast(tensor, src=0)
    return [bool(flag) for flag in tensor]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
