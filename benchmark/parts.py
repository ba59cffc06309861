"""The parts of benchmark/promised.py, each in a process of its own, so that the GPU is empty when the next begins.

    python3 -m benchmark.parts engine llama-3.2-1b cuda FOLDER

After each measurement it writes all there are into FOLDER/promised/MODEL-PART.json, in case that it fails later.

engine        steps of the engine, as `simple-flashinfer bench` times them: decodes, prefill, and the requests that go to the
              daemon; then decodes of requests that share a long beginning: read for each, and in a cascade, once for all
served        output tokens a second over HTTP, all clients beginning at once
transformers  the same by transformers' continuous batching, offline: without HTTP, which is in its favour
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmark.load import Load, run_point
from benchmark.peers.servers import SERVERS, running, stop_servers_when_terminated
from benchmark.target import Target, TargetError
from benchmark.workload import Workload, conversations

_LONG_ENOUGH = 10  # seconds after which nothing is repeated
_WAYS = {"flat": 1 << 62, "cascade": 1}  # threshold of cascades in bytes


@dataclass(frozen=True)
class Sizes:
    """Lengths are in tokens. flags: of engine and daemon alike. repeats: of each measurement, most of them."""

    models: tuple[str, ...]
    streams: tuple[int, ...]  # sequences in a decode step, and clients
    context: int  # of a sequence, halfway through its decode steps
    decode_steps: int
    prefill: tuple[int, int]  # prompts, and the length of each
    prompt: int  # of a client's request, and its output
    output: int
    prefixes: tuple[int, ...]
    prefix_requests: int
    repeats: int
    flags: str


SIZES = {
    "cuda": Sizes(
        ("llama-3.2-1b", "qwen3-0.6b"), (1, 32, 256), 1024, 64, (8, 2048), 256, 256, (256, 1024, 4096, 8192), 64, 3,
        "--max_sequence 256 --max_num_batched_tokens 8192",
    ),
    "cpu": Sizes(("tiny",), (1, 4), 64, 8, (2, 128), 32, 16, (64,), 4, 1, "--max_sequence 4 --kv_cache_memory 64MiB"),
}  # fmt: skip


def _engine(folder: Path, device: str, envs: Path) -> Iterator[tuple[str, Any]]:
    from simple_flashinfer.attention import flashinfer
    from simple_flashinfer.bench.engine import WatchedEngine
    from simple_flashinfer.config import BenchConfig, load_settings

    sizes = SIZES[device]
    flags = ["--model", str(folder), "--device", device, "--temperature", "0", *sizes.flags.split()]
    config = load_settings(BenchConfig, flags)
    engine = WatchedEngine(config)
    yield "machine", asdict(engine.machine)
    yield "model", engine.model

    def runs(name: str, requests: int, prompt: int, output: int, shared: int = 0, repeats: int = sizes.repeats) -> Any:
        lengths = {"prompt_length": prompt, "output_length": output, "shared_prefix_length": shared}
        workload = engine.workload(replace(config, **lengths, batch_sizes=(requests,)))
        engine.measure(workload, requests, workload.warm_up_length(requests))
        own = prompt - shared // config.page_size * config.page_size
        for _ in range(repeats):
            result = engine.measure(workload, requests, output)
            if result.prefill.tokens != requests * own:
                raise RuntimeError(f"{name}: {requests * own} tokens were to be computed, not {result.prefill.tokens}")
            yield name, asdict(result)

    for streams in sizes.streams:
        yield from runs(f"decode {streams}", streams, sizes.context - sizes.decode_steps // 2, sizes.decode_steps)
    yield from runs("prefill", *sizes.prefill, sizes.decode_steps)
    yield from runs("engine", sizes.streams[-1], sizes.prompt, sizes.output)

    layers = engine.backend.layers.values()
    yield "bytes a token and layer", max(layer.bytes_per_token(engine.backend.kv_dtype) for layer in layers)
    yield "threshold", flashinfer._CASCADE_BYTES
    for shared in sizes.prefixes:
        for way in _WAYS if device == "cuda" else ("flat",):
            flashinfer._CASCADE_BYTES = _WAYS[way]
            yield from runs(f"{way} {shared}", sizes.prefix_requests, shared + 32, sizes.decode_steps, shared, repeats=1)


def _served(folder: Path, device: str, envs: Path) -> Iterator[tuple[str, Any]]:
    import uvloop

    sizes = SIZES[device]
    command = [sys.executable, "-m", "simple_flashinfer.main", "--host", "127.0.0.1", "--device", device]
    command += sizes.flags.split()
    server = replace(SERVERS["ours"], command=lambda at: [*command, "--model", str(at.model), "--port", str(at.port)])
    with running(server, envs, folder, sizes.streams[-1], envs / "promised" / f"{folder.name}-daemon.log") as at:
        for streams in sizes.streams:
            for result in uvloop.run(_clients(at.url, folder, sizes, streams)):
                yield f"served {streams}", result


async def _clients(url: str, folder: Path, sizes: Sizes, streams: int) -> list[dict[str, Any]]:
    """Requests that all begin at once, several times. Raises TargetError unless each is answered as it was asked."""
    target = await Target.connect("the daemon", url, endpoint="completions", model=str(folder))
    try:
        # a seed of its own: no prompt is sent twice
        source = await conversations(Workload(sizes.prompt, sizes.output, seed=streams), target.count)
        load, results = Load(concurrency=streams, conversations=streams), []
        # they end one after the other, so that there is a CUDA graph for each number of requests that may be left
        warm = [tuple(replace(turn, output_length=2 + i) for turn in next(source)) for i in range(streams)]
        for requests in (iter(warm), *[source] * sizes.repeats):
            result = await run_point(target, requests, load)
            if result.failed or result.invalid or result.short or (result.cached_tokens or 0) > result.prompt_tokens / 5:
                raise TargetError(f"not answered as asked: {result.as_json()}")
            results.append(result.as_json())
        return results[1:]
    finally:
        target.client.close()


def _transformers(folder: Path, device: str, envs: Path) -> Iterator[tuple[str, Any]]:
    import numpy as np
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    sizes = SIZES[device]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
    greedy = GenerationConfig(do_sample=False, max_new_tokens=sizes.output, eos_token_id=-1)  # -1: none ends an answer
    batching = ContinuousBatchingConfig(max_memory_percent=None if device == "cuda" else 0.02)
    random = np.random.default_rng(0)
    for streams in sizes.streams:
        seconds: list[float] = []
        while len(seconds) < sizes.repeats and sum(seconds) < _LONG_ENOUGH:
            prompts = random.integers(3, model.config.vocab_size, (streams, sizes.prompt)).tolist()
            # its manager stays until the next call; what that prepares, graphs among it, is not in the times below
            answers = model.generate_batch(prompts, greedy, batching, persistent_manager=True).values()
            if [len(answer.generated_tokens) for answer in answers] != [sizes.output] * streams:
                raise RuntimeError(f"answers of other lengths than asked for: {[answer.error for answer in answers]}")
            seconds.append(max(a.lifespan[1] for a in answers) - min(a.created_time for a in answers))
            yield f"transformers {streams}", {"output_throughput": streams * sizes.output / seconds[-1]}
        model.destroy_cached_continuous_batching_manager()


PARTS = {"engine": _engine, "served": _served, "transformers": _transformers}


def main(part: str, model: str, device: str, folder: str) -> None:
    stop_servers_when_terminated()
    envs, found = Path(folder), dict[str, list[Any]]()
    file = envs / "promised" / f"{model}-{part}.json"
    for name, figure in PARTS[part](envs / "models" / model, device, envs):
        found.setdefault(name, []).append(figure)
        unfinished = file.with_suffix(".unfinished")  # this process may be stopped at any time
        unfinished.write_text(json.dumps(found))
        unfinished.replace(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
