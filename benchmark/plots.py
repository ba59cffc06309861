"""Pictures of measured points, one line a server. matplotlib is in the extra `bench`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmark.report import Point, grouped, median

_COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#64748b", "#dc2626")
_Curve = Callable[[list[Point]], tuple[float | None, float | None]]


def draw(points: Sequence[Point], folder: Path) -> list[Path]:
    """Writes latency.png (time to first token, and time per token, against load) and throughput.png (against latency).

    Repeats are medians. Raises ModuleNotFoundError without matplotlib.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    closed = points[0].load.rps is None
    level = "Concurrent requests" if closed else "Requests per second offered"
    points = [point for point in points if (point.load.rps is None) == closed]  # a picture has one kind of load
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    _lines(left, points, lambda group: (group[0].level, median(group, "ttft.p50")))
    _lines(left, points, lambda group: (group[0].level, median(group, "ttft.p99")), dashed=True)
    _label(left, level, "Time to first token (ms)", "Time to first token: median, and p99 dashed", log_y=True)
    _lines(right, points, lambda group: (group[0].level, median(group, "tpot.mean")))
    _label(right, level, "Mean time per output token (ms)", "Time per output token after the first")
    for axes in (left, right) if closed else ():
        levels = sorted({point.level for point in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(levels, [f"{each:g}" for each in levels])
        axes.minorticks_off()
    paths = [folder / "latency.png", folder / "throughput.png"]
    figure.savefig(paths[0], dpi=150)
    plt.close(figure)

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    _lines(axes, points, lambda group: (median(group, "tpot.mean"), median(group, "output_throughput")), levels=True)
    unit = "concurrent requests" if closed else "requests per second offered"
    title = f"Throughput against latency (figures: {unit})"
    _label(axes, "Mean time per output token (ms)", "Output tokens per second", title)
    figure.savefig(paths[1], dpi=150)
    plt.close(figure)
    return paths


def _lines(axes: Any, points: Sequence[Point], curve: _Curve, dashed: bool = False, levels: bool = False) -> None:
    names = list(dict.fromkeys(point.server["name"] for point in points))
    for index, name in enumerate(names):
        groups = [group for (_, server), group in grouped(points).items() if server == name]
        dots = [(*curve(group), group[0].level) for group in sorted(groups, key=lambda group: group[0].level)]
        drawn = [(x, y, level) for x, y, level in dots if x is not None and y is not None]
        style = {"linestyle": (0, (4, 3)), "alpha": 0.5, "linewidth": 1.2} if dashed else {"label": name, "linewidth": 2}
        marker = "" if dashed else "o"
        colour = _COLOURS[index % len(_COLOURS)]
        axes.plot([x for x, _, _ in drawn], [y for _, y, _ in drawn], marker=marker, markersize=5, color=colour, **style)
        for x, y, level in drawn if levels else ():
            axes.annotate(
                f"{level:g}", (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8, color=colour
            )


def _label(axes: Any, x: str, y: str, title: str, log_y: bool = False) -> None:
    from matplotlib.ticker import LogLocator

    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=11)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    else:
        axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
