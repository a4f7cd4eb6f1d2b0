"""Reads the GPUs of this machine from NVIDIA's driver, if it has one."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

from cluster.services.capabilities.server_values import MB, Gpu, in_units, percent

logger = logging.getLogger(__name__)


def read_gpus() -> list[Gpu]:
    """All GPUs, in the driver's order. What a GPU does not tell is None, with the reason."""
    nvml = _driver()
    if nvml is None:
        return []
    try:
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as error:  # all else of the machine can be read
        return [Gpu(name="unknown", unknown={"name": str(error)})]
    return [_read_gpu(nvml, index) for index in range(count)]


@cache
def _driver() -> Any:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        logger.debug("This machine has no GPU of NVIDIA: %s", error)
        return None
    return pynvml


def _read_gpu(nvml: Any, index: int) -> Gpu:
    unknown: dict[str, str] = {}

    def read(field: str, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except nvml.NVMLError as error:
            unknown[field] = str(error)
            return None

    gpu = read("name", lambda: nvml.nvmlDeviceGetHandleByIndex(index))
    if gpu is None:  # it is lost
        return Gpu(name=f"GPU {index}", unknown=unknown)
    memory = read("memory_used_mb", lambda: nvml.nvmlDeviceGetMemoryInfo(gpu))
    rates = read("usage_percent", lambda: nvml.nvmlDeviceGetUtilizationRates(gpu))
    if memory is None:
        unknown |= dict.fromkeys(("memory_total_mb", "memory_usage_percent"), unknown["memory_used_mb"])
    power = read("power_draw_w", lambda: nvml.nvmlDeviceGetPowerUsage(gpu))
    return Gpu(
        name=read("name", lambda: nvml.nvmlDeviceGetName(gpu)) or f"GPU {index}",
        usage_percent=rates and rates.gpu,
        memory_used_mb=in_units(memory and memory.used, MB),
        memory_total_mb=in_units(memory and memory.total, MB),
        memory_usage_percent=percent(memory and memory.used, memory and memory.total),
        temperature=read("temperature", lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)),
        power_draw_w=power and power / 1000,
        fan_speed_percent=read("fan_speed_percent", lambda: nvml.nvmlDeviceGetFanSpeed(gpu)),
        unknown=unknown,
    )
