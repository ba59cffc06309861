"""How much memory there is, and how many pages of KV cache it makes."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from simple_flashinfer.attention import AttentionLayer
from simple_flashinfer.config import Config, ConfigError

logger = logging.getLogger(__name__)

_CPU_DEFAULT = 4 << 30
_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if abs(num_bytes) >= 2**28 else f"{num_bytes / 2**20:.1f} MiB"


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken: of the device, or of the machine within the container's limit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later use is not taken
        return int(torch.cuda.mem_get_info(device)[0])
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    for folder, limit, usage in _CGROUPS:
        try:
            left = int((folder / limit).read_text()) - int((folder / usage).read_text())
            # files that were read lately count as used, but are given up when memory is needed
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = min(free, left + int(stat.get("total_inactive_file", stat.get("inactive_file", 0))))
        except (OSError, ValueError):  # no such cgroup, or no limit ("max")
            continue
    return max(free, 0)


def page_bytes(layers: Sequence[AttentionLayer], page_size: int, dtype: torch.dtype) -> int:
    """Bytes that one page takes in all layers together."""
    return page_size * sum(layer.bytes_per_token(dtype) for layer in layers)


def plan_pages(config: Config, bytes_per_page: int, device: torch.device, model_len: int, reserve: int) -> tuple[int, int]:
    """(num_pages, max_model_len). `reserve` bytes stay free for activations, workspaces and CUDA graphs.

    The pool is never larger than max_sequence requests of full length can use. Raises ConfigError, with the amount that is
    missing and the flag to change, when a request of the length that was asked for would not fit.
    """
    free = available_memory(device)
    wanted_len = config.max_model_len or model_len
    if wanted_len > model_len:
        raise ConfigError(f"--max_model_len {wanted_len} is more than the {model_len} tokens that the model was made for")
    pages_per_request = -(-wanted_len // config.page_size)
    if config.kv_cache_memory is not None:
        budget = config.kv_cache_memory
        if budget > free - reserve:
            beside = f" beside {gib(reserve)} for the largest step" if reserve else ""
            raise ConfigError(
                f"--kv_cache_memory {gib(budget)} is {gib(budget + reserve - free)} more than the "
                f"{gib(max(free - reserve, 0))} that are free{beside}"
            )
    else:
        budget = int(free * config.memory_utilization) - reserve
        if reserve and budget < bytes_per_page:
            raise ConfigError(
                f"a step of the largest size takes {gib(reserve)}, which leaves nothing of --memory_utilization "
                f"{config.memory_utilization:g} of the {gib(free)} that are free for a KV cache; lower "
                "--max_num_batched_tokens or --max_sequence, or raise --memory_utilization"
            )
        if device.type == "cpu":
            budget = min(budget, _CPU_DEFAULT)
    num_pages = min(budget // bytes_per_page, config.max_sequence * pages_per_request)
    if num_pages >= pages_per_request:
        return num_pages, wanted_len
    missing = (pages_per_request - max(num_pages, 0)) * bytes_per_page
    if config.max_model_len is not None or num_pages < 1:
        raise ConfigError(
            f"--max_model_len {wanted_len} needs {gib(pages_per_request * bytes_per_page)} of KV cache, {gib(missing)} more "
            "than there is; lower --max_model_len, or raise --kv_cache_memory or --memory_utilization"
        )
    shorter = num_pages * config.page_size
    logger.warning(
        "The KV cache holds %d tokens, fewer than the model's context of %d: requests are limited to %d. "
        "%s more (--kv_cache_memory) would hold one of full length.",
        shorter, wanted_len, shorter, gib(missing),
    )  # fmt: skip
    return num_pages, shorter
