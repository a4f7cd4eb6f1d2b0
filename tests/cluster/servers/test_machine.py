"""The measurements of this machine, compared with what the system itself says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.servers import gpus
from cluster.servers.file_systems import FileSystems
from cluster.servers.machine import Machine
from cluster.services.capabilities.server_values import GB
from tests.support.waiting import TIMEOUT

# In a mount namespace of its own: a mount that never answers and / are read twice, by which process each time.
HANGING_MOUNT = """
import asyncio, ctypes, json, os, sys
from cluster.servers.file_systems import FileSystems

path = sys.argv[1]
libc = ctypes.CDLL(None, use_errno=True)
device = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
if libc.mount(b"hang", path.encode(), b"fuse", 0, options):
    sys.exit(f"cannot mount: {os.strerror(ctypes.get_errno())}")

async def work():
    systems = FileSystems()
    answers = []
    for _ in range(2):
        sizes = await systems.sizes([path, "/"])
        answers.append([sizes[path].error, sizes["/"].total, systems._child.pid])
    await systems.close()
    print(json.dumps(answers))

asyncio.run(work())
"""


def proc_meminfo() -> dict[str, str]:
    return dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())


def proc_uptime() -> float:
    return float(Path("/proc/uptime").read_text().split()[0])


def df_of_root() -> list[str]:
    """Its size, what is used, and that in percent."""
    return subprocess.check_output(["df", "-B1", "--output=size,used,pcent", "/"], text=True).splitlines()[1].split()


async def test_the_values_are_those_of_the_system() -> None:
    machine = Machine([])
    first = (await machine.read()).cpu
    assert first
    assert first.usage_percent is None  # there is no measurement before
    values = await machine.read()
    await machine.close()

    meminfo, uptime, df = proc_meminfo(), proc_uptime(), df_of_root()
    total = int(meminfo["MemTotal"].split()[0]) * 1024
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    assert values.memory
    assert values.memory.total_gb == round(total / GB, 2)
    assert values.memory.available_gb == pytest.approx(available / GB, abs=0.5)
    assert values.cpu
    assert values.cpu.cores == os.cpu_count()
    assert values.cpu.usage_percent is not None
    assert 0 <= values.cpu.usage_percent <= 100
    assert values.uptime_seconds == pytest.approx(uptime, abs=60)

    root = next(disk for disk in values.disks if disk.mount_point == "/")
    assert root.total_gb == round(int(df[0]) / GB, 2)
    assert root.used_gb == pytest.approx(int(df[1]) / GB, abs=0.5)
    assert root.usage_percent == pytest.approx(int(df[2].rstrip("%")), abs=1.1)  # df rounds up


async def test_the_load_of_the_processors_is_that_between_two_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([(100.0, 900.0), (175.0, 925.0)])

    def cpu_times() -> object:
        user, idle = next(times)
        return psutil._ntuples.scputimes(  # pyright: ignore[reportAttributeAccessIssue]
            user=user, nice=0.0, system=0.0, idle=idle, iowait=0.0, irq=0.0, softirq=0.0, steal=0.0, guest=user,
            guest_nice=0.0,
        )  # fmt: skip

    monkeypatch.setattr(psutil, "cpu_times", cpu_times)
    machine = Machine([])
    await machine.read()
    cpu = (await machine.read()).cpu
    await machine.close()
    assert cpu
    assert cpu.usage_percent == 75.0


async def test_a_file_system_of_the_settings_is_read_or_has_a_reason(tmp_path: Path) -> None:
    machine = Machine([str(tmp_path), str(tmp_path / "missing")])
    systems = (await machine.read()).filesystems
    await machine.close()
    assert systems
    there, missing = systems
    assert there.total_gb
    assert (there.file_count, there.error) == (None, None)
    assert (missing.total_gb, missing.usage_percent, missing.error) == (None, None, "No such file or directory")


async def test_the_sizes_go_on_after_their_process_was_killed() -> None:
    systems = FileSystems()
    before = (await systems.sizes(["/"]))["/"]
    child = systems._child  # pyright: ignore[reportPrivateUsage]
    assert child
    child.kill()
    await child.wait()
    with pytest.raises(ConnectionError):
        await systems.sizes(["/"])
    after = (await systems.sizes(["/"]))["/"]
    await systems.close()
    assert (after.total, after.error) == (before.total, None)


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="Only root may mount.")
def test_a_mount_that_never_answers_delays_the_others_once(tmp_path: Path) -> None:
    command = ["unshare", "--mount", sys.executable, "-c", HANGING_MOUNT, str(tmp_path)]
    output = subprocess.check_output(command, text=True, timeout=TIMEOUT)
    first, second = json.loads(output)
    assert "does not answer" in first[0]
    assert "does not answer" in second[0]
    assert first[1] == second[1] == os.statvfs("/").f_blocks * os.statvfs("/").f_frsize
    assert second[2] == first[2], "a mount that hangs is not asked again at once, which would cost the process"


class NVMLError(Exception):
    """The error of NVIDIA's library."""


class FakeDriver:
    """The calls of NVIDIA's library that are used, for three GPUs: a whole one, a part of one (MIG), and a lost one."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index == 2:
            raise NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetName(self, gpu: int) -> str:
        return f"Accelerator {gpu}"

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> object:
        return type("Memory", (), {"used": 6 * GB, "total": 24 * GB})()

    def nvmlDeviceGetUtilizationRates(self, gpu: int) -> object:
        if gpu == 1:
            raise NVMLError("Not Supported")
        return type("Rates", (), {"gpu": 0})()

    def nvmlDeviceGetPowerUsage(self, gpu: int) -> int:
        return 350_000

    def nvmlDeviceGetTemperature(self, gpu: int, sensor: int) -> int:
        return 72

    def nvmlDeviceGetFanSpeed(self, gpu: int) -> int:
        raise NVMLError("Not Supported")


class DriverThatIsGone(FakeDriver):
    def nvmlDeviceGetCount(self) -> int:
        raise NVMLError("Driver Not Loaded")


async def test_without_the_driver_all_else_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_driver", DriverThatIsGone)
    machine = Machine([])
    values = await machine.read()
    await machine.close()
    assert values.memory
    assert [gpu.unknown for gpu in values.gpus] == [{"name": "Driver Not Loaded"}]


def test_what_a_gpu_does_not_tell_is_null_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_driver", FakeDriver)
    whole, part, lost = gpus.read_gpus()
    assert (whole.usage_percent, whole.memory_used_mb, whole.memory_usage_percent) == (0, 6144, 25.0)
    assert (whole.temperature, whole.power_draw_w) == (72, 350)
    assert whole.unknown == {"fan_speed_percent": "Not Supported"}
    assert (part.usage_percent, part.unknown["usage_percent"]) == (None, "Not Supported")
    assert part.memory_total_mb == 24576
    assert (lost.name, lost.memory_total_mb, lost.unknown) == ("GPU 2", None, {"name": "GPU is lost"})
