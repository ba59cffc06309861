"""C++ to a loaded library: compiled for this very machine the first time, then found in the cache.

No headers of torch are used, so that it takes a second and not a minute. Without a compiler, or with one that fails, there
are no kernels, and whoever wanted them does the same in torch.
"""

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
_TIMEOUT_SECONDS = 120


class CompileError(RuntimeError):
    """There is no compiler, or it failed; the message is one sentence."""


@functools.cache
def compiler() -> str | None:
    """The path of $CXX, c++, g++ or clang++, whichever is there first."""
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "simple_flashinfer"


def library_path(source: str, macros: Mapping[str, int]) -> Path:
    """The shared library of a source file of this folder. Raises CompileError."""
    command = [_compiler(), *_FLAGS, *(f"-D{name}={value}" for name, value in macros.items())]
    library = cache_folder() / f"{Path(source).stem}-{_digest(command, source)}.so"
    if not library.exists():
        logger.info("Compiling %s for this machine (once; kept in %s)", source, library.parent)
        _compile(command, source, library)
    return library


def _compiler() -> str:
    path = compiler()
    if path is None:
        raise CompileError("there is no C++ compiler")
    return path


def _compile(command: list[str], source: str, library: Path) -> None:
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            # torch's own OpenMP before the compiler's: one pool of threads, not two that fight for the cores
            openmp = ["-Wl,--as-needed", *_openmp()] if platform.system() == "Linux" else []
            arguments = [*command, str(_FOLDER / source), *openmp, "-o", str(made)]
            done = subprocess.run(arguments, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
                raise CompileError(f"{command[0]} failed: {lines[0].strip()}")
            made.rename(library)  # whole or not at all, whoever else compiles at this moment
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(str(error)) from error


def _openmp() -> list[str]:
    folder = Path(torch.__file__).parent / "lib"
    return [
        str(path) for pattern in ("libgomp*.so*", "libiomp5*.so*", "libomp.so*") for path in sorted(folder.glob(pattern))
    ][:1]


def _digest(command: list[str], source: str) -> str:
    """Of all that the result depends on: the sources, the command, the versions, and the processor."""
    digest = hashlib.sha256()
    for path in (_FOLDER / source, _FOLDER / "scalar.h"):
        digest.update(path.read_bytes())
    digest.update(repr((command, _version(command[0]), torch.__version__, _processor())).encode())
    return digest.hexdigest()[:16]


@functools.cache
def _version(path: str) -> bytes:
    return subprocess.run([path, "--version"], capture_output=True, check=False).stdout


@functools.cache
def _processor() -> str:
    """What -march=native goes by: a cache may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("flags", "Features", "model name", "vendor_id", "cpu family", "model\t", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
