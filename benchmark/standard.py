"""The standard set: the daemon on this machine, always under the same load, for files and pictures that can be compared.

    python3 -m benchmark.standard [--device cuda] [--plot pics] [--save benchmark/results]

Starts the daemon with its default settings (on cuda with --cuda_graph) for each of a few models, sends it closed loops of
more and more clients and then requests that arrive by themselves, and stops it. Nothing is downloaded: the models are the
demo model and random ones of known shapes.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from benchmark import cli, report
from benchmark.peers.install import DEFAULT_ENVS
from benchmark.peers.models import SHAPES, build
from benchmark.peers.servers import ROOT, SERVERS, Start, running, stop_servers_when_terminated

_DEMO = ROOT / "simple_flashinfer" / "demo" / "model"


@dataclass(frozen=True)
class Load:
    """What `benchmark.py` is told for one model, in its own flags: a closed loop, and perhaps an open one.

    They need seeds of their own, or the second finds its prompts in the daemon's prefix cache.
    """

    model: str  # "demo", or one of SHAPES
    closed: str
    opened: str = ""


SETS = {
    "cpu": (
        Load("demo", "--prompt_length 64 --output_length 64 --concurrency_list 1,8,32,64"),
        Load(
            "smollm2-135m",
            "--prompt_length 230 --output_length 128 --concurrency_list 1,8,32",
            "--prompt_length 230 --output_length 64 --rps_list 0.5,1,2 --num_prompts 24 --seed 1",
        ),
    ),
    "cuda": (
        Load(
            "qwen3-0.6b",
            "--prompt_length 512 --output_length 128 --concurrency_list 1,8,32,128",
            "--prompt_length 512 --output_length 128 --rps_list 4,16,64 --duration 20 --seed 1",
        ),
        Load(
            "llama-3.2-1b",
            "--prompt_length 512 --output_length 128 --concurrency_list 1,8,32,128",
            "--prompt_length 512 --output_length 128 --rps_list 4,16,64 --duration 20 --seed 1",
        ),
    ),
}
_FLAGS = {"cpu": ["--device", "cpu"], "cuda": ["--device", "cuda", "--cuda_graph", "true"]}


def _command(start: Start, device: str) -> list[str]:
    command = [sys.executable, "-m", "simple_flashinfer.main", "--model", str(start.model), *_FLAGS[device]]
    command += ["--served_model_name", start.model.name]
    return [*command, "--host", "127.0.0.1", "--port", str(start.port)]


def run(device: str, save: Path, envs: Path, models: list[str]) -> int:
    """Measures, and leaves one JSON file a point in `save`. Returns the exit status: 0 if all requests were answered."""
    server = replace(SERVERS["ours"], command=lambda start: _command(start, device))
    envs.mkdir(parents=True, exist_ok=True)
    for old in save.glob("*.json"):
        old.unlink()
    status = 0
    for load in SETS[device]:
        if load.model not in models:
            continue
        folder = _DEMO if load.model == "demo" else build(load.model, envs / "models" / load.model)
        print(f"\n{load.model}, {device}", flush=True)
        with running(server, envs, folder, 1, envs / f"{load.model}.log") as at:
            for flags in filter(None, (load.closed, load.opened)):
                status |= cli.main(["--compare", f"{load.model}={at.url}", "--save", str(save), *flags.split()])
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(SETS), default="cpu", help="default: %(default)s")
    parser.add_argument("--models", default=f"demo,{','.join(SHAPES)}", help="only these of the set (%(default)s)")
    parser.add_argument("--save", type=Path, default=ROOT / "benchmark" / "results", help="folder (benchmark/results)")
    parser.add_argument("--plot", type=Path, default=ROOT / "pics", help="folder for the pictures (pics)")
    parser.add_argument("--envs", type=Path, default=DEFAULT_ENVS, help="folder where models are made (.bench)")
    options = parser.parse_args()
    stop_servers_when_terminated()
    save = options.save / options.device
    status = run(options.device, save, options.envs.resolve(), options.models.split(","))
    from benchmark import plots

    closed = [point for point in report.read(save) if point.load.concurrency]
    print("drawn:", *plots.draw(closed, options.plot))
    return status


if __name__ == "__main__":
    sys.exit(main())
