"""Measures servers side by side on this machine: one at a time, in turn, several times over.

    python3 -m benchmark.peers.run [--servers ours,vllm] [--shapes tiny] [--clients 1,64] [--repeats 2] [--requests 8]

Installs what is missing, makes random models of known shapes, and for each shape starts each server, sends it the same kind
of closed-loop load at several concurrencies, and stops it; then all of that again, the servers in another order. What comes
out is in one JSON file after each measurement, and at the end in README.md's table. With flags that leave something out, all
goes to the folder of the environments instead, and README.md is left as it is.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import uvloop

from benchmark import report
from benchmark.load import Load, run_point
from benchmark.peers.install import DEFAULT_ENVS, install
from benchmark.peers.models import build
from benchmark.peers.readme import RESULTS, section, write
from benchmark.peers.servers import ROOT, SERVERS, Running, Server, ServerError, running, stop_servers_when_terminated
from benchmark.target import Target, TargetError
from benchmark.workload import Workload, conversations

_BUSY = 0.05  # share of the machine that others may use before a measurement is doubtful
_WARMUP = 8  # tokens of each answer before a measurement, one for each client


@dataclass(frozen=True)
class Plan:
    """requests: how many in all, for each number of clients. Lengths are in tokens."""

    prompt_length: int
    output_length: int
    requests: dict[int, int]


PLANS = {
    "smollm2-135m": Plan(230, 128, {1: 4, 8: 16, 32: 64}),
    "tiny": Plan(24, 128, {1: 16, 64: 256}),
    "qwen3-0.6b": Plan(230, 128, {1: 2, 8: 16}),
}
DEFAULT_SHAPES = ("smollm2-135m", "tiny")


def commit() -> str:
    """Of the working tree, with a + if it has changes; empty where there is no git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


class _Usage:
    """CPU seconds since it was made: of the server with its children, and of all but server and load generator."""

    def __init__(self, server: Running) -> None:
        self._server, self._start = server, self._now(server)

    def _now(self, server: Running) -> tuple[float, float, float, float]:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        return server.cpu_seconds(), time.process_time(), idle, time.monotonic()

    def server_and_others(self) -> tuple[float, float]:
        server, client, idle, wall = (b - a for a, b in zip(self._start, self._now(self._server), strict=True))
        return server, max(0.0, wall * (os.cpu_count() or 1) - idle - server - client)


async def measure(
    server: Server, at: Running, model: Path, plan: Plan, requests: dict[int, int], seed: int
) -> AsyncIterator[dict[str, Any]]:
    """A point for each number of clients in `requests`. Raises TargetError when the server does not answer as it should."""
    options = {"endpoint": "completions", "model": str(model), "extra_body": server.extra_body}
    target = await Target.connect(server.title, at.url, **options)
    try:
        source = await conversations(Workload(plan.prompt_length, plan.output_length, seed=seed), target.count)
        for clients, number in requests.items():
            short = [tuple(replace(turn, output_length=_WARMUP) for turn in next(source)) for _ in range(clients)]
            await run_point(target, iter(short), Load(concurrency=clients, conversations=clients))
            usage = _Usage(at)
            result = await run_point(target, source, Load(concurrency=clients, conversations=number))
            if result.failed or result.invalid or result.short:
                raise TargetError("; ".join([*result.errors, *result.invalid, *result.warnings]))
            server_seconds, others = usage.server_and_others()
            yield {
                "clients": clients,
                **result.as_json(),
                "server_cpu_us_per_token": server_seconds / result.output_tokens * 1e6,
                "others_cpu": others / result.duration / (os.cpu_count() or 1),
                "reported_version": target.version,
            }
    finally:
        target.client.close()


def _rounds(shapes: list[str], servers: list[str], repeats: int) -> Iterator[tuple[int, str, str]]:
    for repeat in range(repeats):
        for shape in shapes:
            for i in range(len(servers)):
                yield repeat, shape, servers[(i + repeat) % len(servers)]


async def run(options: argparse.Namespace) -> bool:
    """Whether all went well."""
    envs: Path = options.envs.resolve()
    logs = envs / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        **report.context(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "commit": commit(),
        "repeats": options.repeats,
        "plans": {shape: asdict(PLANS[shape]) for shape in options.shapes},
        "servers": {},
        "points": [],
    }
    for name in options.servers:
        if name != "ours":
            print(f"{name}: installing, if it is not there yet ...", flush=True)
            install(name, envs)
        server = SERVERS[name]
        described = {"title": server.title, "versions": server.versions(envs), "command": server.shown_command()}
        result["servers"][name] = described | {"extra_body": server.extra_body}
        print(f"{server.title}: {described['versions']}\n    {described['command']}", flush=True)
    folders = {shape: build(shape, envs / "models" / shape) for shape in options.shapes}
    if (busy := psutil.cpu_percent(2) / 100) > _BUSY:
        print(f"Note: other programs use {busy:.0%} of this machine; every figure suffers from that.", flush=True)
    rounds = list(_rounds(options.shapes, options.servers, options.repeats))
    started, failed = time.monotonic(), 0
    for number, (repeat, shape, name) in enumerate(rounds):
        print(f"[{number + 1}/{len(rounds)}] {shape}, {SERVERS[name].title}, {time.monotonic() - started:.0f} s", flush=True)
        async for point in _one_round(options, envs, folders[shape], logs / f"{name}-{shape}.log", repeat, shape, name):
            result["points"].append(point)
            failed += "error" in point
            result["seconds"] = round(time.monotonic() - started)
            options.save.parent.mkdir(parents=True, exist_ok=True)
            options.save.write_text(json.dumps(result, indent=1) + "\n")
            print("    " + _line(point), flush=True)
    print(f"{options.save}: {len(result['points'])} points in {time.monotonic() - started:.0f} s, {failed} failed\n")
    print(section(result))
    if options.save == RESULTS:
        write(RESULTS, ROOT / "README.md")
    return not failed


async def _one_round(
    options: argparse.Namespace, envs: Path, model: Path, log: Path, repeat: int, shape: str, name: str
) -> AsyncIterator[dict[str, Any]]:
    plan, server = PLANS[shape], SERVERS[name]
    requests = {
        clients: options.requests or number
        for clients, number in plan.requests.items()
        if not options.clients or clients in options.clients
    }
    if not requests:
        return
    about = {"server": name, "shape": shape, "repeat": repeat}
    begun, done = time.monotonic(), set()
    try:
        with running(server, envs, model, max(requests), log) as at:
            about["start_seconds"] = round(time.monotonic() - begun, 1)
            async for point in measure(server, at, model, plan, requests, repeat):
                done.add(point["clients"])
                yield about | point
    except (ServerError, TargetError) as error:
        for clients in sorted(requests.keys() - done):
            yield {**about, "clients": clients, "error": str(error)}


def _line(point: dict[str, Any]) -> str:
    clients = f"{point['clients']} clients: "
    if "error" in point:
        return clients + "failed: " + point["error"]
    return clients + (
        f"{point['output_throughput']:.0f} tokens/s, first token {point['times']['ttft']['p50']:.0f} ms, "
        f"{point['server_cpu_us_per_token']:.0f} us of CPU a token, others use {point['others_cpu']:.0%} of the machine"
    )


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", default=",".join(SERVERS), help="which ones (%(default)s)")
    parser.add_argument("--shapes", default=",".join(DEFAULT_SHAPES), help=f"models, of {','.join(PLANS)} (%(default)s)")
    parser.add_argument("--clients", default="", help="concurrencies, of those that a shape has (all)")
    parser.add_argument("--requests", type=int, help="requests at each point, for a quick try (4 to 256, by clients)")
    parser.add_argument("--repeats", type=int, default=2, help="how often each server has its turn (%(default)s)")
    parser.add_argument("--envs", type=Path, default=DEFAULT_ENVS, help="folder of environments and models (.bench)")
    parser.add_argument("--save", type=Path, help="JSON file (benchmark/results/peers.json, if nothing is left out)")
    options = parser.parse_args(argv)
    whole = (options.servers, options.shapes) == (",".join(SERVERS), ",".join(DEFAULT_SHAPES))
    whole = whole and not (options.clients or options.requests)
    options.save = options.save or (RESULTS if whole else options.envs / "peers.json")
    options.servers, options.shapes = options.servers.split(","), options.shapes.split(",")
    for given, known, flag in ((options.servers, SERVERS, "--servers"), (options.shapes, PLANS, "--shapes")):
        if unknown := set(given) - set(known):
            parser.error(f"{flag}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    try:
        options.clients = [int(clients) for clients in options.clients.split(",") if clients]
    except ValueError:
        parser.error(f"--clients: {options.clients!r} is no list of numbers such as 1,8")
    return options


if __name__ == "__main__":
    stop_servers_when_terminated()
    try:
        sys.exit(not uvloop.run(run(arguments())))
    except (ServerError, subprocess.CalledProcessError) as error:
        sys.exit(f"benchmark.peers.run: {error}")
