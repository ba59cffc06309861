"""What is promised of engine and daemon on a GPU, and what of it this machine reaches: measured by one command, offline.

    python3 -m benchmark.promised [--device cuda] [--models llama-3.2-1b,qwen3-0.6b] [--save FOLDER]

Models of known shapes are made, with random weights in bfloat16, and the parts (benchmark/parts.py) run for each, one
at a time. A part that fails or finds no time left is told with its reason, the others go on, and the exit status is 1. A
promise that is not kept is no failure. On the CPU the same runs with small sizes.
"""

import argparse
import json
import operator
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmark import report
from benchmark.parts import PARTS, SIZES, Sizes
from benchmark.peers.install import DEFAULT_ENVS
from benchmark.peers.run import commit
from benchmark.peers.servers import ROOT, stop_servers_when_terminated

Figures = dict[str, list[Any]]  # by what was measured, one for each time
Errors = dict[str, str]  # by part

_PART_SECONDS = 120  # at most
_STOP_SECONDS = 40  # at most: longer than a daemon is waited for
_RESERVE = 20  # seconds of the time that is given, for stopping and telling
_PACKAGES = ("simple-flashinfer", "torch", "transformers", "flashinfer-python", "apache-tvm-ffi", "fastapi", "uvicorn")
_SIGNS = {"<=": operator.le, ">=": operator.ge, ">": operator.gt}
_MIB = 1 << 20


@dataclass(frozen=True)
class Row:
    """measured: None if it was not, by `parts`. sign, bound: what was promised."""

    what: str
    parts: tuple[str, ...]
    measured: float | None
    sign: str
    bound: float
    in_percent: bool = False

    @property
    def reached(self) -> bool | None:
        return None if self.measured is None else _SIGNS[self.sign](self.measured, self.bound)

    def cells(self, errors: Errors) -> list[str]:
        measured, bound = (
            "-" if value is None else f"{value:.1%}" if self.in_percent else f"{value:.2f}"
            for value in (self.measured, self.bound)
        )
        missing = "failed" if errors.keys() & set(self.parts) else "not measured"
        return [self.what, measured, f"{self.sign} {bound}", {None: missing, True: "yes", False: "no"}[self.reached]]


def rows(sizes: Sizes, figures: Figures) -> list[Row]:
    """Of one model: medians beside what was promised. "at n": with n clients."""

    def median(name: str, figure: Callable[[Any], float | None]) -> float | None:
        values = [value for result in figures.get(name, ()) if (value := figure(result)) is not None]
        return statistics.median(values) if values else None

    def times(above: float | None, below: float | None) -> float | None:
        return above / below if above is not None and below else None

    def rate(name: str) -> float | None:
        return median(name, lambda result: result["output_throughput"])

    def over_memory(result: dict[str, Any]) -> float:
        return float(result["decode"]["seconds"] / result["decode"]["bytes"] * figures["machine"][0]["bandwidth"])

    def of_matmuls(result: dict[str, Any]) -> float:
        return float(result["prefill"]["flops"] / result["prefill"]["seconds"] / figures["machine"][0]["matmul_rate"])

    most, (prompts, length), longest, found = sizes.streams[-1], sizes.prefill, sizes.prefixes[-1], []
    for n in sizes.streams:
        over = median(f"decode {n}", over_memory)
        found.append(Row(f"decode of {n} x {sizes.context:,} tokens / memory's time", ("engine",), over, "<=", 1.25))
    for n in sizes.streams:
        idle = median(f"decode {n}", lambda result: result["decode"]["device_idle"])
        found.append(Row(f"GPU idle between decodes of {n}", ("engine",), idle, "<=", 0.05, True))
    share = median("prefill", of_matmuls)
    found.append(Row(f"prefill of {prompts} x {length:,} tokens / matmul rate", ("engine",), share, ">=", 0.6, True))
    flat, cascade = (median(f"{way} {longest}", _step_seconds) for way in ("flat", "cascade"))
    shared = f"{longest:,} tokens shared by {sizes.prefix_requests}"
    found.append(Row(f"cascade's speed / flat decode's, {shared}", ("engine",), times(flat, cascade), ">=", 2.0))
    own = median("engine", lambda result: result["output_tokens_per_second"])
    through = times(rate(f"served {most}"), own)
    found.append(Row(f"HTTP's rate / the engine's at {most}", ("engine", "served"), through, ">=", 0.85, True))
    for n in sizes.streams:
        faster, promise = times(rate(f"served {n}"), rate(f"transformers {n}")), (">=", 2.0) if n == most else (">", 1.0)
        found.append(Row(f"HTTP's rate / transformers' at {n}", ("served", "transformers"), faster, *promise))
    return found


def _step_seconds(result: dict[str, Any]) -> float:
    return float(result["decode"]["seconds"] / result["decode"]["num_steps"])


def pays_from(sizes: Sizes, figures: Figures) -> float | None:
    """Bytes of a layer's K/V from which a cascade, that does not read them again, is faster.

    Between two lengths as if the gain grew evenly; 0 if it always is, None if it is not at the longest.
    """
    each = (sizes.prefix_requests - 1) * figures["bytes a token and layer"][0]
    taken = {n: [_step_seconds(figures[f"{way} {n}"][0]) for way in ("flat", "cascade")] for n in sizes.prefixes}
    gains = [(n * each, without - with_it) for n, (without, with_it) in taken.items()]
    if gains[-1][1] <= 0:
        return None
    found = ((a, b, gain, more) for (a, gain), (b, more) in reversed(list(pairwise(gains))) if gain <= 0)
    return next((a + (b - a) * -gain / (more - gain) for a, b, gain, more in found), 0.0)


def cascades(sizes: Sizes, figures: Figures) -> list[str]:
    """Where the threshold of attention/flashinfer.py ought to be; nothing where it was not measured."""
    if f"cascade {sizes.prefixes[-1]}" not in figures:
        return []
    pays = pays_from(sizes, figures)
    where = "at no length that was tried" if pays is None else f"from {pays / _MIB:.0f} MiB"
    is_at = figures["threshold"][0] / _MIB
    return [f"a cascade is faster {where} of a layer's K/V not read again (it is used from {is_at:.0f} MiB)"]


def doubts(sizes: Sizes, figures: Figures) -> list[str]:
    """What the load generator says of its own measurements."""
    names = [f"served {n}" for n in sizes.streams]
    return [f"{name}: {words}" for name in names for result in figures.get(name, ()) for words in result["warnings"]]


def table(found: Sequence[tuple[str, list[Row], Errors]]) -> str:
    """found: (model, its rows, why parts failed)"""
    lines = [["model", "what", "measured", "promised", "reached"]]
    lines += [[model, *row.cells(errors)] for model, own, errors in found for row in own]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _run(command: list[str], log: Path, seconds: float) -> str | None:
    """Why it failed, or None."""
    if seconds <= 0:
        return "no time was left"
    with log.open("wb") as output:
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=offline)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s; see {log}"
    finally:
        process.terminate()  # it ends its own children
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    words = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["it said nothing"]
    return f"{words[-1][:200]} (status {status}; see {log})" if status else None


def _gpu() -> dict[str, str]:
    names = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    try:
        told = subprocess.check_output(["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"], text=True)
        return dict(zip(names.split(","), told.splitlines()[0].split(", "), strict=True))
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        return {"unknown": str(error)}


def run(options: argparse.Namespace) -> int:
    """All parts, the table, and the file. Returns the exit status."""
    began, sizes, envs = time.monotonic(), SIZES[options.device], options.envs.resolve()
    for folder in (envs / "promised", options.save):
        folder.mkdir(parents=True, exist_ok=True)
    versions = {d.name: d.version for name in _PACKAGES for d in distributions(name=name)}
    gpu = _gpu() if options.device == "cuda" else {}
    result: dict[str, Any] = {**report.context(), "commit": options.commit, "gpu": gpu, "versions": versions}
    result |= {"sizes": asdict(sizes), "models": {}, "notes": {}}
    path, found = options.save / "promised.json", []
    for model in options.models or sizes.models:
        figures: Figures = {}
        errors: Errors = {}
        commands = {"model": ["benchmark.peers.models", model, str(envs / "models" / model)]}
        commands |= {part: ["benchmark.parts", part, model, options.device, str(envs)] for part in PARTS}
        about = result["models"][model] = dict[str, Any]()
        for part, words in commands.items():
            start, command = time.monotonic(), [sys.executable, "-m", *words]
            left = options.minutes * 60 - _RESERVE - (start - began)
            file = envs / "promised" / f"{model}-{part}.json"
            file.unlink(missing_ok=True)
            if error := _run(command, file.with_suffix(".log"), min(left, _PART_SECONDS)):
                errors[part] = error
            own = json.loads(file.read_text()) if file.exists() else {}
            figures |= own
            end = time.monotonic()
            about[part] = {"command": command, "seconds": end - start, "error": error, "figures": own}
            path.write_text(json.dumps(result, indent=1) + "\n")  # whatever comes after
            print(f"{end - began:4.0f} s  {model}, {part}: {error or 'done'}", flush=True)
        result["notes"][model] = [*cascades(sizes, figures), *doubts(sizes, figures)]
        found.append((model, rows(sizes, figures), errors))
    result["table"] = [{"model": model, **asdict(row), "reached": row.reached} for model, own, _ in found for row in own]
    path.write_text(json.dumps(result, indent=1) + "\n")
    notes = [f"{model}: {line}" for model, lines in result["notes"].items() for line in lines]
    print(f"all of it in {path}", *notes, "", table(found), sep="\n")
    return int(any(errors for _, _, errors in found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda", help="default: %(default)s")
    parser.add_argument("--models", type=lambda text: text.split(","), help=f"default: {','.join(SIZES['cuda'].models)}")
    parser.add_argument("--minutes", type=float, default=8, help="what has not ended by then is stopped (%(default)s)")
    parser.add_argument("--save", type=Path, help="folder for promised.json (benchmark/results/DEVICE/promised)")
    parser.add_argument("--commit", default=commit(), help="what is measured, to be told where there is no git")
    parser.add_argument("--envs", type=Path, default=DEFAULT_ENVS, help="folder for models and logs (.bench)")
    options = parser.parse_args()
    options.save = options.save or ROOT / "benchmark" / "results" / options.device / "promised"
    stop_servers_when_terminated()
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
