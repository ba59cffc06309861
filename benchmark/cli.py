"""The command: what `python3 benchmark.py` does with its flags."""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
from tqdm import tqdm

from benchmark import load as loads
from benchmark import report
from benchmark.load import Load
from benchmark.report import Point
from benchmark.target import Target, TargetError
from benchmark.workload import Workload, conversations

_CACHED = 0.2  # of the prompt tokens; a chat template's share is below
_DESCRIPTION = """\
Measures a server that speaks OpenAI's API (this one, vLLM, llama.cpp's, transformers serve): how long until the first
token, how long for each further one, how many in all. Prompts and outputs have exactly the length that you ask for, by the
server's own count; where a server counts something else the run fails and says so."""
_EPILOG = """\
examples
  one server, more and more clients (closed loop: each sends its next request when its last one has ended)
    python3 benchmark.py --url http://localhost:7088 --concurrency_list 1,8,32 --prompt_length 256 --output_length 128
  requests that arrive by themselves (open loop), in bursts; how many a second are answered within bounds
    python3 benchmark.py --rps_list 1,2,4 --arrivals gamma --burstiness 0.5 --duration 60 --slo ttft:500,tpot:50
  two servers taking turns, three times; files and pictures
    python3 benchmark.py --compare ours=http://localhost:7088 --compare vllm=http://localhost:8000 --repeats 3 \\
      --save out --plot out
  the pictures again, from the files
    python3 benchmark.py --plot out --from out

figures (times in ms of the client's clock)
  TTFT  from sending until the first chunk of the answer
  TPOT  (E2E - TTFT) / (tokens - 1), for each request
  ITL   between two chunks of an answer
  E2E   from sending until the last chunk
  benchmark/metrics.py has the exact definitions; they are those of `vllm bench serve`.

The exit status is 1 if a request failed (unless --allow_failures), or a count was not what was asked for."""


def _list(kind: type) -> Any:
    def parse(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",")]
        if not all(value > 0 for value in values):
            raise ValueError(text)
        return values

    parse.__name__ = f"comma-separated list of positive {kind.__name__}"
    return parse


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def _share(text: str) -> float:
    if not 0 <= (number := float(text)) <= 1:
        raise ValueError(text)
    return number


def _slo(text: str) -> dict[str, float]:
    bounds = {name: float(bound) for name, bound in (part.split(":") for part in text.split(","))}
    if unknown := set(bounds) - {"ttft", "tpot", "e2e"}:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of ttft, tpot, e2e")
    return bounds


def _object(text: str) -> dict[str, Any]:
    value = orjson.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def _server(text: str) -> tuple[str, str]:
    name, equals, url = text.partition("=")
    if not (name and equals and url):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=URL")
    return name, url


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="benchmark.py", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = result.add_argument_group("server").add_argument
    add("--url", default="http://localhost:7088", help="base URL, with or without /v1 (default: %(default)s)")
    add(
        "--compare",
        type=_server,
        action="append",
        metavar="NAME=URL",
        help="instead of --url, and several times: these servers, point by point in turn; ratios are to the first",
    )
    add("--model", help="name in the API (default: the first of /v1/models)")
    add("--endpoint", choices=("chat", "completions"), default="chat", help="default: %(default)s")
    add("--api_key", help="sent as a bearer token")
    add(
        "--extra_body",
        type=_object,
        default={},
        metavar="JSON",
        help="more fields for each request; they go before all others",
    )
    add("--timeout", type=float, default=600, metavar="SECONDS", help="for one request (default: %(default)s)")

    add = result.add_argument_group("load").add_argument
    add(
        "--concurrency_list",
        type=_list(int),
        metavar="N,N,...",
        help="closed loop: clients at the same time (default: 1,8,32)",
    )
    add("--rps_list", type=_list(float), metavar="R,R,...", help="open loop: requests per second")
    add("--arrivals", choices=("poisson", "gamma"), default="poisson", help="of the open loop (default: %(default)s)")
    add(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="SHAPE",
        help="of gamma arrivals: below 1 in bursts, 1 as poisson, above more and more regular (default: %(default)s)",
    )
    add(
        "--requests_per_client",
        type=_positive,
        default=4,
        metavar="N",
        help="closed loop: conversations a client (default: 4)",
    )
    add("--num_prompts", type=_positive, metavar="N", help="conversations a point, instead (open loop: default 64)")
    add("--duration", type=float, metavar="SECONDS", help="begin none after this time; without --num_prompts the only end")
    add("--warmup", type=int, default=2, metavar="N", help="conversations before each point that don't count (default: 2)")
    add("--repeats", type=_positive, default=1, metavar="N", help="all points so often; the table has medians")
    add(
        "--seed",
        type=int,
        default=0,
        help="of prompts and arrivals. A server that remembers prompts needs another one each time (default: %(default)s)",
    )

    add = result.add_argument_group("prompts, in tokens by the server's count, chat template included").add_argument
    add("--prompt_length", type=_positive, metavar="N", help="default: 256, or with --start_token as long as that is")
    add("--output_length", type=_positive, metavar="N", help="default: 128, or as recorded with --sharegpt")
    add(
        "--start_token",
        default="",
        metavar="TEXT",
        help="each prompt begins with this text; random words follow up to --prompt_length, if that is given",
    )
    add("--start_token_length", type=_positive, default=1, metavar="N", help="... repeated so many times (default: 1)")
    add(
        "--shared_prefix",
        type=_share,
        default=0.0,
        metavar="SHARE",
        help="share of a prompt, from its start, that is the same in all; otherwise they differ from their second word on",
    )
    add(
        "--sharegpt",
        metavar="FILE",
        help="recorded conversations in ShareGPT's JSON; --prompt_length is then the longest "
        "message taken (default: 1024, estimated)",
    )
    add(
        "--turns",
        type=_positive,
        default=1,
        metavar="N",
        help="requests of a conversation; each sends all before and the server's answers along (default: 1)",
    )

    add = result.add_argument_group("results").add_argument
    add(
        "--slo",
        type=_slo,
        metavar="ttft:MS,tpot:MS,e2e:MS",
        help="bounds for goodput: requests a second that keep all of them",
    )
    add("--save", type=Path, metavar="FOLDER", help="one JSON file a point, with versions and machine")
    add("--save_requests", action="store_true", help="... and with each single request")
    add("--plot", type=Path, metavar="FOLDER", help="pictures: latency against load, throughput against latency")
    add(
        "--from", type=Path, metavar="FOLDER", dest="source", help="measure nothing: table and --plot from what --save wrote"
    )
    add(
        "--max_lag",
        type=float,
        default=20,
        metavar="MS",
        help="a point whose load generator was later than this (p99) is marked (default: %(default)s)",
    )
    add("--allow_failures", action="store_true", help="failed requests are counted, but the exit status stays 0")
    return result  # fmt: skip


def _loads(options: argparse.Namespace) -> list[Load]:
    common = Load(1, duration=options.duration, conversations=1, warmup=max(0, options.warmup), seed=options.seed)
    result = []
    for concurrency in options.concurrency_list or ([] if options.rps_list else [1, 8, 32]):
        number = options.num_prompts or (None if options.duration else concurrency * options.requests_per_client)
        result.append(replace(common, concurrency=concurrency, conversations=number))
    for rps in options.rps_list or ():
        number = options.num_prompts or (None if options.duration else 64)
        arrivals = {"arrivals": options.arrivals, "burstiness": options.burstiness}
        result.append(replace(common, concurrency=None, rps=rps, conversations=number, **arrivals))
    return result


def _workload(options: argparse.Namespace) -> Workload:
    names = (
        "prompt_length",
        "output_length",
        "start_token",
        "start_token_length",
        "shared_prefix",
        "sharegpt",
        "turns",
        "seed",
    )
    return Workload(**{name: getattr(options, name) for name in names})


async def measure(options: argparse.Namespace) -> list[Point]:
    """All points of a run: for each repeat and load, each server in turn. Raises TargetError."""
    context, workload = report.context(), _workload(options)
    targets: list[Target] = []
    sources = []
    points = []
    try:
        for name, url in options.compare or [("server", options.url)]:
            target = await Target.connect(
                name, url, endpoint=options.endpoint, model=options.model, api_key=options.api_key,
                extra_body=options.extra_body, timeout=options.timeout,
            )  # fmt: skip
            targets.append(target)
            sources.append(await conversations(workload, target.count))
            if target.output_fields != ("ignore_eos", "min_tokens"):
                print(f"{name} takes no ignore_eos and min_tokens together: outputs may end early", file=sys.stderr)
        for repeat in range(options.repeats):
            for load in _loads(options):
                for index in range(len(targets)):
                    turn = (index + repeat) % len(targets)  # nobody is always the first
                    target, source = targets[turn], sources[turn]
                    point = await _point(options, target, source, replace(load, seed=options.seed + repeat), workload)
                    points.append(replace(point, repeat=repeat, context=context))
                    if options.save:
                        report.save(points[-1], options.save, options.save_requests)
                    points[-1].result.records.clear()
    finally:
        for target in targets:
            target.client.close()
    names = [target.name for target in targets]
    return sorted(points, key=lambda point: names.index(point.server["name"]))  # the first is what ratios are to


async def _point(options: argparse.Namespace, target: Target, source: Any, load: Load, workload: Workload) -> Point:
    with tqdm(total=load.conversations, desc=f"{target.name}, {load.label}", leave=False, disable=None) as bar:
        result = await loads.run_point(target, source, load, slo=options.slo, max_lag=options.max_lag, on_end=bar.update)
    shared = workload.shared_prefix or workload.start_token or workload.turns > 1 or workload.sharegpt
    if not shared and (result.cached_tokens or 0) > _CACHED * result.prompt_tokens:
        share = (result.cached_tokens or 0) / result.prompt_tokens
        result.warnings.append(f"{share:.0%} of the prompt tokens came from the server's prefix cache: use another --seed")
    for message in [*result.invalid, *result.errors, *result.warnings]:
        print(f"{target.name}, {load.label}: {message}", file=sys.stderr)
    return Point(target.describe(), load, workload, 0, result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    command = parser()
    options = command.parse_args(arguments)
    if options.source and not options.source.is_dir():
        command.error(f"--from {options.source}: no such folder")
    try:
        if options.source:
            points = report.read(options.source)
        else:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                points = runner.run(measure(options))
    except (TargetError, FileNotFoundError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 1
    print(report.table(points))
    if options.plot:
        from benchmark import plots

        print("drawn:", *plots.draw(points, options.plot))
    failed = any(point.result.failed for point in points) and not options.allow_failures
    return int(failed or any(point.result.invalid for point in points))


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:  # Windows
        return None
    return uvloop.new_event_loop
