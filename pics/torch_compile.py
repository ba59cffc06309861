"""Draws pics/torch_compile.png: stress_test.py against the daemon with and without torch.compile: `make bench-compile`.

    python3 -m pics.torch_compile [--model FOLDER] [--users 20] [--seconds 60] [--warmup 30]

For each setting the daemon is started anew and warmed up, since compilation happens with the first requests; then locust
adds one user a second and keeps all for the rest of the time. What is drawn is locust's own history, each point over its
last 10 seconds. The mode reduce-overhead, which is CUDA graphs, is there only with `--device cuda`.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from urllib.request import Request, urlopen

from benchmark.peers.install import DEFAULT_ENVS
from benchmark.peers.servers import ROOT, SERVERS, running, stop_servers_when_terminated

_SETTINGS = {
    "off": [],
    "default": ["--torch_compile", "true"],
    "reduce-overhead": ["--torch_compile", "true", "--torch_compile_mode", "reduce-overhead"],
}
_COLOURS = {"off": "#2563eb", "default": "#ea580c", "reduce-overhead": "#16a34a"}
_REQUEST = "chat, streamed"  # the kind of which times are drawn; requests a second are of all kinds
_RAMP = 1  # users a second
_COMPILE_SECONDS = 1200


def measure(setting: str, options: argparse.Namespace, folder: Path) -> Path:
    """Locust's history as a CSV file in `folder`."""

    def command(start):
        flags = ["--device", options.device, *_SETTINGS[setting]]
        daemon = [sys.executable, "-m", "simple_flashinfer.main", "--model", options.model, *flags]
        return [*daemon, "--host", "127.0.0.1", "--port", str(start.port)]

    folder.mkdir(parents=True, exist_ok=True)
    with running(replace(SERVERS["ours"], command=command), folder, folder, 1, folder / f"{setting}.log") as at:
        _wait_for_an_answer(at.url)
        _locust(at.url, options.users, options.users, options.warmup, [])
        _wait_for_an_answer(at.url)  # it may be compiling for a larger batch
        _locust(at.url, options.users, _RAMP, options.seconds, ["--csv", str(folder / setting), "--csv-full-history"])
    return folder / f"{setting}_stats_history.csv"


def _wait_for_an_answer(url: str) -> None:
    body = json.dumps({"prompt": "Hello", "max_tokens": 8}).encode()
    request = Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urlopen(request, timeout=_COMPILE_SECONDS) as answer:
        answer.read()


def _locust(url: str, users: int, rate: int, seconds: int, flags: list[str]) -> None:
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "stress_test.py"), "-H", url, "--headless"]
    command += ["-u", str(users), "-r", str(rate), "-t", f"{seconds}s", "--exit-code-on-error", "1", *flags]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"locust failed:\n{done.stderr[-3000:]}")


def history(path: Path) -> dict[str, list[tuple[float, float]]]:
    """(seconds, value) of "users", "requests" a second, median "ttft" in ms and "rate", tokens a second of one stream."""
    found = defaultdict(list)
    requests = defaultdict(float)
    users = {}
    with path.open() as file:
        rows = list(csv.DictReader(file))
    start = min(int(row["Timestamp"]) for row in rows)
    for row in rows:
        second = int(row["Timestamp"]) - start
        users[second] = float(row["User Count"])
        if row["Type"] == "POST":
            requests[second] += float(row["Requests/s"])
        for name, kind in (("ttft", "TTFT"), ("rate", "tok/s")):
            if (row["Type"], row["Name"]) == (kind, _REQUEST) and row["50%"] not in {"N/A", "0"}:
                found[name].append((second, float(row["50%"])))
    return {**found, "users": sorted(users.items()), "requests": sorted(requests.items())}


def draw(histories: dict[str, dict[str, list[tuple[float, float]]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 6), sharex=True, layout="constrained")
    titles = {
        "users": "Users",
        "requests": "Requests per second, all kinds",
        "ttft": "Time to first token, median (ms)",
        "rate": "Tokens per second of one stream, median",
    }
    for ax, (name, title) in zip(axes.flat, titles.items(), strict=True):
        for setting, lines in histories.items():
            points = lines.get(name, [])
            ax.plot([x for x, _ in points], [y for _, y in points], label=setting, color=_COLOURS[setting], linewidth=1.8)
        ax.set_title(title, fontsize=11)
        ax.set_ylim(bottom=0)
        ax.grid(color="#e5e7eb", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[1]:
        ax.set_xlabel("Seconds")
    axes[0][0].legend(frameon=False, title="torch.compile")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="what the daemon serves (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--users", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--seconds", type=int, default=60, help="of each measurement (%(default)s)")
    parser.add_argument("--warmup", type=int, default=30, help="seconds with all users before it (%(default)s)")
    parser.add_argument("--envs", type=Path, default=DEFAULT_ENVS, help="folder for locust's files (.bench)")
    parser.add_argument(
        "--plot", type=Path, default=Path(__file__).with_suffix(".png"), help="picture (pics/torch_compile.png)"
    )
    options = parser.parse_args()
    stop_servers_when_terminated()
    histories = {}
    for setting in _SETTINGS if options.device == "cuda" else list(_SETTINGS)[:2]:
        print(f"torch.compile {setting}: {options.warmup} s of warm-up, {options.seconds} s measured ...", flush=True)
        histories[setting] = history(measure(setting, options, options.envs.resolve() / "locust"))
    draw(histories, options.plot)
    print("drawn:", options.plot)


if __name__ == "__main__":
    main()
