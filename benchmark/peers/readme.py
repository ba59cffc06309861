"""Writes what run.py measured into README.md, between <!-- peers --> and <!-- /peers -->.

python3 -m benchmark.peers.readme [RESULTS.json] [README.md]
"""

import json
import re
import statistics
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

from benchmark.peers.servers import ROOT

RESULTS = ROOT / "benchmark" / "results" / "peers.json"
_BUSY = 0.05  # share of the machine that others used, from which the reader is told
_MEASURES = {  # row: (path in a point, whether more is better, shapes that have this row; None: all)
    "tokens/s": ("output_throughput", True, None),
    "first token, ms": ("times.ttft.p50", False, None),
    "server's CPU, µs a token": ("server_cpu_us_per_token", False, ("tiny",)),
}
_ABOUT = """\
Output tokens a second, of all clients together; median time to the first token; CPU time of the server with all its
processes. Best of a row in bold; {turns}. Closed loop, prompts that have nothing in common, outputs of exactly the length
asked for, random weights in bfloat16. One server at a time, with the load generator on the same machine: {cpu}, {cores}
cores, {memory} GiB, {system}, {date}{commit}.{doubt} The servers, and how they were started (ENV is the folder of a
server's environment):"""


def section(results: dict[str, Any]) -> str:
    """Markdown of the table, and below it of all that is needed to get the same again."""
    points = [point for point in results["points"] if "error" not in point]
    servers = [name for name in results["servers"] if any(point["server"] == name for point in results["points"])]
    rows = [["model: tokens in + out", "clients", "", *(results["servers"][name]["title"] for name in servers)]]
    rows.append(["---", "--:", "---", *["--:"] * len(servers)])
    for shape, clients in dict.fromkeys((point["shape"], point["clients"]) for point in results["points"]):
        plan = results["plans"][shape]
        head = [f"{shape}: {plan['prompt_length']} + {plan['output_length']}", str(clients)]
        for measure, (path, more_is_better, shapes) in _MEASURES.items():
            if shapes is not None and shape not in shapes:
                continue
            figures = [_median(points, (shape, clients, name), path) for name in servers]
            rows.append([*head, measure, *_cells(figures, more_is_better)])
            head = ["", ""]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n\n" + _about(results, points)


def _about(results: dict[str, Any], points: list[dict[str, Any]]) -> str:
    machine, busiest = results["machine"], max((point["others_cpu"] for point in points), default=0.0)
    doubt = f" Other programs used up to {busiest:.0%} of it meanwhile, so this is doubtful." if busiest > _BUSY else ""
    text = _ABOUT.format(
        turns=_turns(points),
        cpu=machine["cpu"],
        cores=machine["cores"],
        memory=results["memory_gib"],
        system=machine["system"].split("-")[0],
        date=results["date"][:10],
        commit=f", at {results['commit']}" if results["commit"] else "",
        doubt=doubt,
    )
    lines = []
    for server in results["servers"].values():
        versions = ", ".join(f"{package} {version}" for package, version in server["versions"].items())
        body = f"\n  each request with {json.dumps(server['extra_body'])}" if server["extra_body"] else ""
        lines.append(f"{server['title']} ({versions})\n  {server['command']}{body}")
    return textwrap.fill(text, 125) + "\n\n```\n" + "\n".join(lines) + "\n```"


def _turns(points: list[dict[str, Any]]) -> str:
    """Of those that were finished: a run that was stopped has fewer than it was to have."""
    least = min(Counter((point["shape"], point["clients"], point["server"]) for point in points).values(), default=0)
    if least <= 1:
        return "each server had one turn"
    return f"figures are medians of {least} turns, tokens/s of one point differ by up to {_spread(points):.0%} between turns"


def _of(points: list[dict[str, Any]], key: tuple[str, int, str], path: str) -> list[float]:
    values = []
    for point in points:
        if (point["shape"], point["clients"], point["server"]) == key:
            value: Any = point
            for name in path.split("."):
                value = value[name]
            values.append(value)
    return values


def _median(points: list[dict[str, Any]], key: tuple[str, int, str], path: str) -> float | None:
    values = _of(points, key, path)
    return statistics.median(values) if values else None


def _spread(points: list[dict[str, Any]]) -> float:
    """The largest difference between turns of one point, as a share of the larger figure."""
    keys = {(point["shape"], point["clients"], point["server"]) for point in points}
    turns = [_of(points, key, "output_throughput") for key in keys]
    return max((1 - min(values) / max(values) for values in turns), default=0.0)


def _cells(figures: list[float | None], more_is_better: bool) -> list[str]:
    known = [figure for figure in figures if figure is not None]
    best = (max if more_is_better else min)(known, default=None)
    texts = ["failed" if figure is None else f"{figure:,.0f}" for figure in figures]
    return [
        f"**{text}**" if figure is not None and figure == best else text for text, figure in zip(texts, figures, strict=True)
    ]


def write(results: Path, readme: Path) -> None:
    """Raises ValueError where README.md has no such place."""
    text = readme.read_text()
    place = re.compile(r"(<!-- peers -->\n).*?(<!-- /peers -->)", re.DOTALL)
    if not place.search(text):
        raise ValueError(f"{readme} has no lines <!-- peers --> and <!-- /peers -->")
    written = section(json.loads(results.read_text()))
    readme.write_text(place.sub(lambda found: f"{found[1]}{written}\n{found[2]}", text))


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    write(*[*given, *(RESULTS, ROOT / "README.md")[len(given) :]])
