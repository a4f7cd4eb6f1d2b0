"""The processes that train together. Whatever one of them decides, all must, or they wait for each other for good."""

import torch
from torch import distributed


def is_several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def all_agree(wish: bool) -> bool:
    """Whether every process wishes it."""
    if not is_several():
        return wish
    wishes = torch.tensor([wish], dtype=torch.uint8, device=_device())
    distributed.all_reduce(wishes, op=distributed.ReduceOp.MIN)
    return bool(wishes[0])


def first_says(*wishes: bool) -> list[bool]:
    """What the first process wishes."""
    if not is_several():
        return list(wishes)
    told = torch.tensor(wishes, dtype=torch.uint8, device=_device())
    distributed.broadcast(told, src=0)
    return [bool(one) for one in told]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
