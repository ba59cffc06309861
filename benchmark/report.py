"""Measured points as JSON files, and as a table in which repeats are medians."""

import datetime
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import orjson

from benchmark.load import Load
from benchmark.metrics import PointResult
from benchmark.workload import Workload


@dataclass(frozen=True)
class Point:
    """One file: a result with all that is needed to know what it is a result of."""

    server: dict[str, Any]
    load: Load
    workload: Workload
    repeat: int
    result: PointResult
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def level(self) -> float:
        return self.load.rps or self.load.concurrency or 0


def context() -> dict[str, Any]:
    """Date, command line and machine; the load averages are of now, so ask before measuring."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        cpu = next(
            (line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu
        )
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.orig_argv,
        "client_python": platform.python_version(),
        "machine": {
            "system": platform.platform(),
            "cpu": cpu,
            "cores": os.cpu_count(),
            "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        },
    }


def save(point: Point, folder: Path, requests: bool = False) -> Path:
    """Writes NAME-LOAD-REPEAT.json. `requests`: with each single request's figures."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{point.server['name']}-{point.load.label}-{point.repeat}".replace("/", "_per_").replace(" ", "_")
    data = {**asdict_shallow(point), "result": point.result.as_json(requests)}
    path = folder / f"{name}.json"
    path.write_bytes(orjson.dumps(data, option=orjson.OPT_INDENT_2))
    return path


def asdict_shallow(point: Point) -> dict[str, Any]:
    return {
        **point.context,
        "server": point.server,
        "load": asdict(point.load),
        "workload": asdict(point.workload),
        "repeat": point.repeat,
    }


def read(folder: Path) -> list[Point]:
    """The points that `save` wrote. Raises FileNotFoundError where there are none."""
    points = []
    for path in sorted(folder.glob("*.json")):
        data = orjson.loads(path.read_bytes())
        result = {name: value for name, value in data.pop("result").items() if name != "requests"}
        load, workload = Load(**data.pop("load")), Workload(**data.pop("workload"))
        points.append(Point(data.pop("server"), load, workload, data.pop("repeat"), PointResult(**result), data))
    if not points:
        raise FileNotFoundError(f"no measured points (*.json) in {folder}")
    return sorted(points, key=lambda point: (point.context["date"], point.repeat))


def value(point: Point, path: str) -> float | None:
    """A figure by its path in the result, as "ttft.p50" or "output_throughput"; None where there is none."""
    name, _, statistic = path.partition(".")
    if not statistic:
        return cast("float | None", getattr(point.result, name))
    times = point.result.times.get(name)
    return None if times is None else times[statistic]


def median(points: Iterable[Point], path: str) -> float | None:
    values = [each for point in points if (each := value(point, path)) is not None]
    return statistics.median(values) if values else None


def grouped(points: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    """Repeats together, by load and server, in the order in which they were measured."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for label in dict.fromkeys(point.load.label for point in points):
        for name in dict.fromkeys(point.server["name"] for point in points):
            if chosen := [point for point in points if (point.load.label, point.server["name"]) == (label, name)]:
                groups[label, name] = chosen
    return groups


_COLUMNS = {
    "req/s": "request_throughput",
    "output tok/s": "output_throughput",
    "total tok/s": "total_throughput",
    "TTFT p50": "ttft.p50",
    "p99": "ttft.p99",
    "TPOT mean": "tpot.mean",
    "p99 ": "tpot.p99",
    "ITL p99": "itl.p99",
    "E2E p50": "e2e.p50",
    "p99  ": "e2e.p99",
    "goodput": "goodput",
}
_RATIOS = ("output_throughput", "ttft.p50", "tpot.mean")


def table(points: Sequence[Point]) -> str:
    """Markdown; times in ms. In brackets: how many times the first server's figure under the same load."""
    names = list(dict.fromkeys(point.server["name"] for point in points))
    columns = {head: path for head, path in _COLUMNS.items() if path != "goodput" or value(points[0], path) is not None}
    rows = [["load", "server", "ok", "failed", *columns, ""]]
    for (label, name), group in grouped(points).items():
        first = [point for point in points if (point.load.label, point.server["name"]) == (label, names[0])]
        counts = [str(sum(getattr(point.result, which) for point in group)) for which in ("completed", "failed")]
        cells = [_cell(group, first if name != names[0] else [], path) for path in columns.values()]
        marks = {"invalid": any(p.result.invalid for p in group), "lagging": any(p.result.lagging for p in group)}
        marks["short answers"] = any(p.result.short for p in group)
        rows.append([label, name, *counts, *cells, ", ".join(mark for mark, is_set in marks.items() if is_set)])
    if not any(row[-1] for row in rows):
        rows = [row[:-1] for row in rows]
    rows.insert(1, ["---", "---", *["--:"] * (len(rows[0]) - 2)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    align = [str.ljust, str.ljust, *[str.rjust] * (len(widths) - 2)]
    lines = [[pad(cell, width) for pad, cell, width in zip(align, row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(group: Sequence[Point], first: Sequence[Point], path: str) -> str:
    figure, reference = median(group, path), median(first, path)
    if figure is None:
        return "-"
    text = f"{figure:,.0f}" if figure >= 1000 else f"{figure:.3g}"
    return f"{text} ({figure / reference:.2f}x)" if reference and path in _RATIOS else text
