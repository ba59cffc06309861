"""Puts an engine together, says what it will do, and starts it in a thread or in a process."""

import atexit
import ctypes
import logging
import multiprocessing
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simple_flashinfer.config import DEMO_MODEL, Config, ConfigError
from simple_flashinfer.core.engine import EngineCore
from simple_flashinfer.core.scheduler import Scheduler
from simple_flashinfer.demo import DEMO_FOLDER
from simple_flashinfer.engine.channel import (
    EXIT_SECONDS,
    EngineEnd,
    FrontEnd,
    ProcessChannel,
    ProcessEngineEnd,
    ThreadChannel,
)
from simple_flashinfer.engine.loop import serve
from simple_flashinfer.types import Add, EngineInfo, EngineRequest, SamplingParams

if TYPE_CHECKING:
    import torch

    from simple_flashinfer.attention import AttentionBackend, AttentionLayer
    from simple_flashinfer.kernels.cpu import CpuKernels
    from simple_flashinfer.kernels.cuda import CudaKernels
    from simple_flashinfer.model.loader import LoadedModel

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_CUBLAS_BYTES = 64 << 20  # 32 MiB for each of two streams, on Hopper


def resolve_model(config: Config) -> str:
    """The hub id or folder that transformers can read."""
    if config.model == DEMO_MODEL:
        return str(DEMO_FOLDER)
    if config.model.startswith(("/", ".", "~")) and not Path(config.model).expanduser().is_dir():
        raise ConfigError(f"--model {config.model}: there is no such folder")
    return str(Path(config.model).expanduser()) if config.model.startswith("~") else config.model


class _Phases:
    """Seconds of each part of the start."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name] = now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._seconds.items())
        return f"{sum(self._seconds.values()):.1f} s ({parts})"


def build_engine(config: Config, path: str) -> tuple[EngineCore, EngineInfo]:
    """Loads the model, measures it, and sizes the KV cache. Raises ConfigError in a sentence when it can't be done."""
    phases = _Phases()
    from simple_flashinfer.model.loader import resolve_device

    device = resolve_device(config)
    if config.overlap and device.type == "cpu":  # CUDA needs no thread to go on while the host does something else
        # whatever runs on the model does so in one thread, from the beginning: OpenMP has a pool for each that calls it
        worker = ThreadPoolExecutor(1, "model")
        core, info = worker.submit(_build_engine, config, path, device, worker, phases).result()
    else:
        core, info = _build_engine(config, path, device, None, phases)
    if device.type == "cuda":
        warm_up(core)
        phases.end("first request")
    logger.info("Engine ready in %s", phases)
    return core, info


def _build_engine(
    config: Config, path: str, device: "torch.device", worker: ThreadPoolExecutor | None, phases: _Phases
) -> tuple[EngineCore, EngineInfo]:
    import torch

    from simple_flashinfer.attention import UnsupportedLayerError, backend_class
    from simple_flashinfer.model.kv_storage import gib, page_bytes, plan_pages
    from simple_flashinfer.model.loader import load_model
    from simple_flashinfer.model.runner import ModelRunner
    from simple_flashinfer.model.threads import num_threads

    phases.end("import")
    cuda_graph = _uses_graphs(config, device)
    overlap = device.type == "cuda" if config.overlap is None else config.overlap
    _check_quantization(config, device)
    try:
        with _memory_for("the weights", "choose a smaller --model, or --torch_dtype bfloat16 where they are float32"):
            loaded = load_model(path, config, device)
        phases.end("load")
        if device.type == "cpu":
            torch.set_num_threads(num_threads(loaded.weight_bytes))
            _keep_memory()
        model_dtype = next(loaded.model.parameters()).dtype
        cpu, cuda = _cpu_kernels(config, device, model_dtype), _cuda_kernels(config, device)
        if config.fuse and not config.torch_compile:
            with _memory_for("the weights once more", "try --fuse false, which joins no matrices, or a smaller --model"):
                _fuse(config, loaded, model_dtype, cpu, cuda)
            phases.end("fuse")
        runner = ModelRunner(
            loaded, device, config.max_sequence, overlap, worker, config.torch_profiling,
            filter_probs=cuda.filter_probs if cuda else None, draw=cpu.draw if cpu else None,
        )  # fmt: skip
        with _memory_for("a step of the largest size", "lower --max_num_batched_tokens or --max_sequence"):
            layers, step_bytes = runner.trace_layers(config.max_num_batched_tokens, config.max_sequence)
        name, dtype, kv_dtype = _attention(config, device, model_dtype, layers)
        bytes_per_page = page_bytes(layers, config.page_size, kv_dtype)
        row_bytes = int(loaded.text_config.vocab_size) * model_dtype.itemsize
        num_graphs, graph_bytes = _graphs(config, step_bytes, row_bytes) if cuda_graph else (0, 0)
        reserve = step_bytes + graph_bytes + backend_class(name).workspace_bytes(layers, num_graphs)
        num_pages, max_model_len = plan_pages(config, bytes_per_page, device, loaded.max_model_len, reserve)
        with _memory_for("the KV cache", "lower --memory_utilization or --kv_cache_memory"):
            backend = _make_backend(config, name, layers, num_pages, dtype, kv_dtype, device)
            runner.use_backend(backend, fuse=config.fuse and not config.torch_compile)
    except (UnsupportedLayerError, ImportError) as error:
        raise ConfigError(f"--model {config.model}: {error}") from error
    if config.torch_compile:
        runner.compile(config.torch_compile_mode)
    if cuda_graph:
        runner.use_cuda_graphs(config.max_sequence)
    scheduler = Scheduler(
        max_num_seqs=config.max_sequence,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        page_size=config.page_size,
        num_pages=num_pages,
        prefix_caching=config.prefix_caching,
    )
    phases.end("plan")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, threads: {torch.get_num_threads()}"
    logger.info(
        "Model: %s (%s), %s of %s weights on %s",
        config.model, type(loaded.model).__name__, gib(loaded.weight_bytes), _name(model_dtype), where,
    )  # fmt: skip
    if config.quantization != "none":
        logger.info("Linear layers: their weights rounded to %s", config.quantization)
    logger.info(
        "Attention: %s in %s, K and V kept in %s, %d layers", name, _name(dtype), _name(kv_dtype), len(layers)
    )  # fmt: skip
    logger.info(
        "KV cache: %d pages of %d tokens = %d tokens in %s; %.1f sequences of max_model_len %d fit",
        num_pages, config.page_size, num_pages * config.page_size, gib(num_pages * bytes_per_page),
        num_pages * config.page_size / max_model_len, max_model_len,
    )  # fmt: skip
    info = EngineInfo(
        max_model_len=max_model_len,
        vocab_size=int(loaded.text_config.vocab_size),
        page_size=config.page_size,
        num_pages=num_pages,
        eos_token_ids=loaded.eos_token_ids,
    )
    return EngineCore(scheduler, runner, overlap, check_when_idle=config.loglevel == "debug"), info


def warm_up(core: EngineCore) -> None:
    """One short request before there are others: kernels are compiled, or at least loaded, when they are first used."""
    params = SamplingParams(max_tokens=3, top_k=2, top_p=0.5)
    core.apply([Add(EngineRequest("warm-up", np.zeros(2, np.int32), params, max_tokens=3, seed=0))])
    while core.has_work:
        step = core.step()
        for output in step.outputs if step else ():
            if output.error is not None:
                raise ConfigError(f"a first request, to try the device, failed: {output.error}")


def _fuse(
    config: Config, loaded: "LoadedModel", dtype: "torch.dtype", cpu: "CpuKernels | None", cuda: "CudaKernels | None"
) -> None:
    from simple_flashinfer.model.fuse import fuse
    from simple_flashinfer.model.fused_layers import fuse_layers

    fuse(loaded.model, partial(cpu.pack, int8=config.quantization == "int8") if cpu else None)
    if kernels := cpu or (cuda if cuda and cuda.supports(dtype) else None):
        longest = max(config.max_model_len or loaded.max_model_len, config.max_num_batched_tokens)
        fuse_layers(loaded.model, dtype, kernels, min(longest, loaded.max_model_len))


def _cpu_kernels(config: Config, device: "torch.device", dtype: "torch.dtype") -> "CpuKernels | None":
    from simple_flashinfer.kernels import cpu
    from simple_flashinfer.kernels.compiler import CompileError

    if not config.fuse or config.torch_compile or device.type != "cpu" or not cpu.supports(dtype):
        return None
    try:
        return cpu.cpu_kernels(dtype)
    except CompileError as error:
        if config.quantization != "none":
            raise ConfigError(f"--quantization {config.quantization} needs kernels in C++, and {error}") from error
        logger.warning("Matmuls and small layers run in plain torch, which is slower: %s", error)
        return None


def _cuda_kernels(config: Config, device: "torch.device") -> "CudaKernels | None":
    # sdpa is plain torch, all of it: what is left when FlashInfer is missing, or suspected
    if device.type != "cuda" or config.attention_backend == "sdpa":
        return None
    from simple_flashinfer.kernels.cuda import cuda_kernels

    logger.info("Loading FlashInfer's kernels; those that this machine has not used before are compiled, for minutes")
    return cuda_kernels()


def _keep_memory() -> None:
    """Asks glibc not to give large blocks back: a step frees and takes megabytes, and new memory costs a fault a page.

    5 ms of a step of 32 requests that draw from a vocabulary of 49,152.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes


@contextmanager
def _memory_for(what: str, hint: str) -> Iterator[None]:
    """The device's running out of memory, in a sentence."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"the device has too little free memory for {what}; {hint}") from error


def _graphs(config: Config, step_bytes: int, row_bytes: int) -> tuple[int, int]:
    """How many batch sizes CUDA graphs may be recorded for, and bytes that they keep.

    Each keeps its logits, of row_bytes a request, for decodes that share a long prompt once more; the memory in between is
    one pool for all, as large as the largest needs. cuBLAS has a workspace for each stream that it worked on.
    """
    from simple_flashinfer.model.cuda_graph import DecodeGraphs

    sizes = {DecodeGraphs.size_of(count) for count in range(1, config.max_sequence + 1)}
    share = min(1.0, max(sizes) / config.max_num_batched_tokens)
    ways = 2 if config.cascade and config.prefix_caching else 1
    return len(sizes), ways * sum(sizes) * row_bytes + int(step_bytes * share) + _CUBLAS_BYTES


def _uses_graphs(config: Config, device: "torch.device") -> bool:
    """Raises ConfigError where they were asked for and can't be."""
    records = config.torch_compile and config.torch_compile_mode in ("reduce-overhead", "max-autotune")
    if config.cuda_graph is None:
        return device.type == "cuda" and config.attention_backend not in ("cpu", "sdpa") and not records
    if config.cuda_graph and device.type != "cuda":
        raise ConfigError("--cuda_graph needs a CUDA device, and the model runs on cpu")
    if config.cuda_graph and config.attention_backend in ("cpu", "sdpa"):
        raise ConfigError("--cuda_graph needs --attention_backend flashinfer: torch's attention can't be recorded")
    if config.cuda_graph and records:
        raise ConfigError(
            f"--cuda_graph and --torch_compile_mode {config.torch_compile_mode} both record CUDA graphs; "
            "use --torch_compile_mode default, or max-autotune-no-cudagraphs"
        )
    return config.cuda_graph


def _check_quantization(config: Config, device: "torch.device") -> None:
    if config.quantization == "none":
        return
    if device.type != "cpu":
        raise ConfigError(f"--quantization {config.quantization} is for cpu only, and the model runs on {device.type}")
    if not config.fuse or config.torch_compile:
        raise ConfigError(f"--quantization {config.quantization} needs --fuse true and --torch_compile false")


def _attention(
    config: Config, device: "torch.device", model_dtype: "torch.dtype", layers: "list[AttentionLayer]"
) -> tuple[str, "torch.dtype", "torch.dtype"]:
    """Which backend, the dtype of attention, and the dtype in which K and V are kept."""
    import torch

    name = config.attention_backend
    if name in ("cpu", "flashinfer") and device.type != name.replace("flashinfer", "cuda"):
        raise ConfigError(f"--attention_backend {name} does not run on {device.type}; use --attention_backend sdpa")
    dtype = model_dtype
    if config.torch_dtype_autocast != "auto":
        dtype = getattr(torch, config.torch_dtype_autocast)
    elif name in ("auto", "flashinfer") and device.type == "cuda" and model_dtype == torch.float32:
        dtype = torch.bfloat16
    kv_dtype = torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else dtype
    if name in ("sdpa", "flashinfer") or device.type == "cuda":
        return name.replace("auto", "flashinfer"), dtype, kv_dtype
    reason = _against_cpu_kernels(config, layers, dtype)
    if reason is None:
        return "cpu", dtype, kv_dtype
    if name == "cpu":
        raise ConfigError(f"--attention_backend cpu is not possible: {reason}; use --attention_backend sdpa")
    logger.warning("Attention in plain torch, which is slower: %s", reason)
    return "sdpa", dtype, kv_dtype


def _against_cpu_kernels(config: Config, layers: "list[AttentionLayer]", dtype: "torch.dtype") -> str | None:
    from simple_flashinfer.attention.cpu import CpuBackend
    from simple_flashinfer.kernels.cpu import PAGE_MULTIPLE

    if config.kv_cache_dtype == "fp8":
        return "its kernels can't read --kv_cache_dtype fp8"
    if config.page_size % PAGE_MULTIPLE:
        return f"its kernels need a --page_size that is a multiple of {PAGE_MULTIPLE}"
    for layer in layers:
        if reason := CpuBackend.unsupported(layer, dtype):
            return f"layer {layer.layer_idx} of the model {reason}"
    return None


def _make_backend(
    config: Config,
    name: str,
    layers: "list[AttentionLayer]",
    num_pages: int,
    dtype: "torch.dtype",
    kv_dtype: "torch.dtype",
    device: "torch.device",
) -> "AttentionBackend":
    from simple_flashinfer.attention import backend_class
    from simple_flashinfer.attention.compare import ComparingBackend

    options = {"cascade": config.cascade} if name == "flashinfer" else {}
    backend = backend_class(name)(
        layers, num_pages=num_pages, page_size=config.page_size, dtype=dtype, device=device, kv_dtype=kv_dtype, **options
    )
    backend.warm_up()
    return ComparingBackend(backend) if config.compare_sdpa_prefill else backend


def _name(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")


# waits until the engine is ready; raises ConfigError in a sentence if it can't be
Connect = Callable[[], tuple[FrontEnd, EngineInfo]]


def start_engine(config: Config, path: str, num_others: int = 0) -> tuple[Connect, list[Connection]]:
    """Begins. For this process's front end, and a pipe for each of the front ends in other processes: see `connect_engine`.

    An engine process starts meanwhile, on another core; a thread only when it is waited for.
    """
    return _start_process(config, path, num_others) if config.engine_process else (lambda: _start_thread(config, path), [])


def _start_thread(config: Config, path: str) -> tuple[FrontEnd, EngineInfo]:
    ready: Future[EngineInfo] = Future()

    def run(end: EngineEnd) -> None:
        # built in this thread: OpenMP has a pool of threads for each thread that calls it, and puts them all to sleep
        # between calls when together they are more than the cores (23 instead of 16 ms a step of a model of 135M)
        try:
            core, info = build_engine(config, path)
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(info)
        serve(core, end, config.microsleep)

    channel = ThreadChannel(run)
    info = ready.result()
    sys.setswitchinterval(5e-4)  # the event loop must not wait 5 ms for the engine thread to let the interpreter go
    return channel, info


def _start_process(config: Config, path: str, num_others: int) -> tuple[Connect, list[Connection]]:
    context = multiprocessing.get_context("spawn")  # a forked CUDA context does not work
    ours, theirs = zip(*(context.Pipe() for _ in range(1 + num_others)), strict=True)
    process = context.Process(target=_engine_process, args=(config, path, theirs), name="engine", daemon=True)
    process.start()
    atexit.register(process.kill)  # whatever happens here, it does not stay behind
    for connection in theirs:
        connection.close()

    def wait_for_exit() -> None:
        process.join(EXIT_SECONDS)
        if process.is_alive():
            process.kill()

    def wait() -> tuple[FrontEnd, EngineInfo]:
        try:
            return connect_engine(ours[0], wait_for_exit)
        except EOFError:
            process.join()
            raise ConfigError(f"the engine process ended at start (exit code {process.exitcode})") from None

    return wait, list(ours[1:])


def connect_engine(connection: Connection, wait_for_exit: Callable[[], None] | None = None) -> tuple[FrontEnd, EngineInfo]:
    """Waits until the engine is ready. Raises ConfigError if it can't be, EOFError if it is gone."""
    ready: EngineInfo | str = connection.recv()
    if isinstance(ready, str):
        raise ConfigError(ready)
    return ProcessChannel(connection, wait_for_exit), ready


def _engine_process(config: Config, path: str, connections: Sequence[Connection]) -> None:
    from simple_flashinfer.log import set_up_logging

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they reach whole groups of processes: the front ends decide, over the pipes
    set_up_logging(config.loglevel)
    ready: EngineInfo | str
    try:
        core, ready = build_engine(config, path)
    except ConfigError as error:
        ready = str(error)
    for connection in connections:
        with suppress(OSError):  # it is gone already
            connection.send(ready)
    if not isinstance(ready, str):
        serve(core, ProcessEngineEnd(connections), config.microsleep)
    logging.shutdown()
    os._exit(0)  # all is put away; torch's modules would take most of a second more
