"""Servers to be measured side by side: how each is started for two things only, speed and a fair comparison.

Each has an environment of its own under one folder (see install.py); `ours` runs with the Python that runs this. All get the
same checkpoint in bfloat16, all cores, room for every client at once, and no reuse of earlier prompts. `running` starts one
and stops it with all its children.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes.util import find_library
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import psutil

ROOT = Path(__file__).parents[2]
INSTALLED = "installed.json"  # in a server's folder: its versions, written when all is there
MAX_MODEL_LEN = 1024  # tokens of one request, prompt and output, that the servers make room for
_INSTALL = "run `python3 -m benchmark.peers.install`, or leave it out with --servers"
_START_SECONDS = 600  # the first start may compile
_STOP_SECONDS = 30
_CORES = os.cpu_count() or 1
_KV_CACHE_GIB = 4
_NOT_INHERITED = {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONPATH", "VIRTUAL_ENV"}  # each server gets all cores


class ServerError(Exception):
    """A server that is not installed, or did not start; says what to do."""


@dataclass(frozen=True)
class Start:
    """What a command line is made of. environment: the server's own folder. clients: the most at the same time."""

    environment: Path
    model: Path
    port: int
    clients: int

    @property
    def bin(self) -> Path:
        return self.environment / "bin"

    @property
    def gguf(self) -> Path:
        return self.model / "model.gguf"


def _ours(start: Start) -> list[str]:
    command = [sys.executable, "-m", "simple_flashinfer.main", "--model", str(start.model)]
    return [*command, "--host", "127.0.0.1", "--port", str(start.port), "--prefix_caching", "false"]


def _vllm(start: Start) -> list[str]:
    # the `vllm` command of this build looks for a distribution of that name and finds none; the module starts
    command = [str(start.bin / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(start.model)]
    command += ["--host", "127.0.0.1", "--port", str(start.port), "--dtype", "bfloat16"]
    return [*command, "--max-model-len", str(MAX_MODEL_LEN), "--no-enable-prefix-caching"]


def _vllm_variables(start: Start) -> dict[str, str]:
    """Its guide to CPUs asks for Intel's OpenMP, which its environment has, and tcmalloc, which the system may have."""
    preload = [str(start.environment / "lib" / "libiomp5.so"), find_library("tcmalloc_minimal")]
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(_KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{_CORES - 1}",
        "VLLM_CACHE_ROOT": str(start.environment / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(filter(None, preload)),
    }


def _transformers(start: Start) -> list[str]:
    command = [str(start.bin / "transformers"), "serve", str(start.model), "--continuous-batching", "--device", "cpu"]
    share = _KV_CACHE_GIB * 2**30 / psutil.virtual_memory().total  # by itself it would take most of the memory
    command += ["--dtype", "bfloat16", "--cb-max-memory-percent", f"{share:.2f}"]
    return [*command, "--host", "127.0.0.1", "--port", str(start.port)]


def _llamacpp(start: Start) -> list[str]:
    command = [str(start.environment / "build/bin/llama-server"), "-m", str(start.gguf), "-t", str(_CORES)]
    command += ["-np", str(start.clients), "-c", str(start.clients * MAX_MODEL_LEN), "--no-cache-prompt", "--no-webui"]
    return [*command, "--host", "127.0.0.1", "--port", str(start.port)]


_CONVERT = """\
import sys
sys.path.insert(0, sys.argv.pop(1))
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"  # it knows tokenizers by a list; this one is cut as GPT-2's
convert_hf_to_gguf.main()
"""


def _to_gguf(start: Start) -> None:
    """Write the checkpoint as bfloat16 GGUF beside it, by llama.cpp's own converter, unless it is there."""
    if start.gguf.exists():
        return
    unfinished = start.gguf.with_suffix(".unfinished")
    command = [str(start.bin / "python"), "-c", _CONVERT, str(start.environment / "src/vendor/llama.cpp")]
    command += [str(start.model), "--outtype", "bf16", "--outfile", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServerError(f"llama.cpp's converter failed on {start.model}:\n{done.stderr[-2000:]}")
    unfinished.rename(start.gguf)


@dataclass(frozen=True)
class Server:
    """name: also of its folder. variables: of its environment. extra_body: what each request must carry for it."""

    name: str
    title: str
    command: Callable[[Start], list[str]]
    variables: Callable[[Start], dict[str, str]] = lambda start: {}
    extra_body: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Start], None] = lambda start: None

    def versions(self, envs: Path) -> dict[str, str]:
        """Of the server and what it computes with. Raises ServerError if it is not installed."""
        if self.name == "ours":
            return {name: version(name) for name in ("simple-flashinfer", "torch", "transformers")}
        try:
            return dict(json.loads((envs / self.name / INSTALLED).read_text()))
        except OSError as error:
            raise ServerError(f"{self.title} is not in {envs}: {_INSTALL}") from error

    def shown_command(self) -> str:
        """The command line with what differs from run to run in capitals, and the variables before it."""
        start = Start(Path("ENV"), Path("MODEL"), port=0, clients=1)
        words = ["python3" if word == sys.executable else word for word in self.command(start)]
        words[words.index("--port") + 1] = "PORT"
        if "-np" in words:
            words[words.index("-np") + 1], words[words.index("-c") + 1] = "CLIENTS", f"{MAX_MODEL_LEN}*CLIENTS"
        return " ".join([*(f"{name}={value}" for name, value in self.variables(start).items()), *words])


SERVERS = {
    server.name: server
    for server in (
        Server("ours", "simple-flashinfer", _ours),
        Server(
            "vllm",
            "vLLM",
            _vllm,
            variables=_vllm_variables,
        ),
        Server(
            "transformers",
            "transformers serve",
            _transformers,
            extra_body={"generation_config": json.dumps({"eos_token_id": -1})},  # its way to say ignore_eos
        ),
        Server("llamacpp", "llama.cpp", _llamacpp, prepare=_to_gguf),
    )
}


class Running:
    """A server that answers at `url`."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.url = url
        self.pid = process.pid
        self._process = process

    def cpu_seconds(self) -> float:
        """User and system time of the process and its children, up to now."""
        total = 0.0
        for process in _family(self._process):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total


def stop_servers_when_terminated() -> None:
    """SIGTERM ends this process as Ctrl-C does, so that no server outlives it. For the start of a program."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


@contextmanager
def running(server: Server, envs: Path, model: Path, clients: int, log: Path) -> Iterator[Running]:
    """Starts `server` for `model` on a free port, with its output in `log`. Raises ServerError if it does not answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = Start(envs / server.name, model, port, clients)
    server.prepare(start)
    left_out = _NOT_INHERITED - ({"PYTHONPATH"} if server.name == "ours" else set())  # it runs with this Python
    inherited = {name: value for name, value in os.environ.items() if name not in left_out}
    variables = {**inherited, "HF_HUB_OFFLINE": "1", **server.variables(start)}
    if server.name != "ours":
        variables["PATH"] = f"{start.bin}{os.pathsep}{variables['PATH']}"
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                server.command(start), stdout=output, stderr=output, cwd=ROOT, env=variables, start_new_session=True
            )
        except OSError as error:
            raise ServerError(f"{server.title} can't be started ({error}): {_INSTALL}") from error
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(server, process, url, log)
        yield Running(process, url)
    finally:
        _stop(process)


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            tail = log.read_text(errors="replace")[-3000:]
            raise ServerError(f"{server.title} ended with {process.returncode}; the end of {log}:\n{tail}")
        with contextlib.suppress(URLError, OSError), urlopen(f"{url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise ServerError(f"{server.title} is not ready after {_START_SECONDS} s; see {log}")


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The process and all that it started, also those whose parents are gone: they are in the session that it began."""
    family = []
    for other in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(other.pid) == process.pid:
                family.append(other)
    return family


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the process politely, and whatever is left of its children without asking."""
    family = _family(process)
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=_STOP_SECONDS)
    for left in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    process.wait()
    psutil.wait_procs(alive, timeout=5)
