"""What the machine can do at its best: how fast it reads memory, and how fast it multiplies matrices."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import torch

from simple_flashinfer.model.kv_storage import available_memory

_RUNS, _SECONDS = 9, 1.5  # so many runs at most, and no new one after so long
_BYTES = 1 << 30  # far more than any cache holds
_MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
_PACKAGES = ("simple-flashinfer", "torch", "transformers", "flashinfer-python")


@dataclass(frozen=True, slots=True)
class Machine:
    """bandwidth in bytes/s, matmul_rate in FLOP/s (2 for a multiplication and its addition); cache_bytes 0: unknown."""

    device: str
    num_cores: int
    num_threads: int
    bandwidth: float
    matmul_rate: float
    matmul_dtype: str
    cache_bytes: int
    versions: dict[str, str]


def measure_bandwidth(device: torch.device) -> float:
    """Bytes/s: on the CPU of reading with all threads, on CUDA of a copy within the device, read and written bytes together.

    Before a model is loaded: its KV cache takes most of a GPU's memory.
    """
    count = min(_BYTES, available_memory(device) // 4) // 4
    if device.type == "cpu":
        return _read_rate(count)
    rate = _copy_rate(count, device)
    torch.cuda.empty_cache()
    return rate


def _read_rate(count: int) -> float:
    source = torch.empty(count)
    source.fill_(1)  # written to, so that there is memory behind every page
    return source.nbytes / _median_seconds(source.sum, source.device)


def _copy_rate(count: int, device: torch.device) -> float:
    source = torch.zeros(count, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device)


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of large square matrices."""
    size = _MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _median_seconds(lambda: torch.mm(a, b), device)


def seconds_without_core() -> float:
    """How long threads of this process were ready to run while others had the cores, so far; 0 where Linux does not tell."""
    nanoseconds = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, IndexError):  # a thread that ended meanwhile
            nanoseconds += int(path.read_text().split()[1])
    return nanoseconds / 1e9


def describe(device: torch.device, dtype: torch.dtype, bandwidth: float) -> Machine:
    cuda = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return Machine(
        device=cuda.name if cuda else _cpu_name(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        num_threads=torch.get_num_threads(),
        bandwidth=bandwidth,
        matmul_rate=measure_matmul_rate(device, dtype),
        matmul_dtype=str(dtype).removeprefix("torch."),
        cache_bytes=cuda.L2_cache_size if cuda else _cpu_cache_bytes(),
        versions={"python": platform.python_version()}
        | {d.name: d.version for name in _PACKAGES for d in distributions(name=name)},
    )


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    def timed() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with torch.inference_mode():
        timed()
        seconds = [timed()]
        while len(seconds) < _RUNS and sum(seconds) < _SECONDS:
            seconds.append(timed())
    return statistics.median(seconds)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _cpu_cache_bytes() -> int:
    """Of the last cache before memory, as the first core sees it; 0 where the system does not tell."""
    try:
        sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max(int(size.removesuffix("K")) * 1024 for size in sizes)
    except (OSError, ValueError):
        return 0
