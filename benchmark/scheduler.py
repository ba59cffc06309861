"""The scheduler and the KV manager alone, without a model: microseconds a step.

    python3 benchmark/scheduler.py

Decode steps over many running requests, also with a pool of a million pages and with a hundred thousand requests waiting: a
step should grow with the first and with nothing else.
"""

import statistics
import time

import numpy as np

from simple_flashinfer.core.scheduler import Scheduler
from simple_flashinfer.types import EngineRequest, ModelOutput, SamplingParams

PROMPT = 200


def measure(running: int, num_pages: int, waiting: int, prefix_caching: bool) -> tuple[float, float]:
    """Median and mean of a decode step, in microseconds."""
    generator = np.random.default_rng(0)
    scheduler = Scheduler(
        max_num_seqs=running,
        max_num_batched_tokens=running * PROMPT,
        max_model_len=2048,
        page_size=16,
        num_pages=num_pages,
        prefix_caching=prefix_caching,
    )
    for i in range(running + waiting):
        prompt = generator.integers(10, 30_000, PROMPT).astype(np.int32)
        scheduler.add(EngineRequest(str(i), prompt, SamplingParams(), 1000, 0, (1, 2)))
    times = []
    for _ in range(161):
        drawn = generator.integers(10, 30_000, running).astype(np.int32)
        start = time.perf_counter()
        batch = scheduler.schedule()
        assert batch is not None
        assert len(batch.rows) == running
        scheduler.update(batch, ModelOutput(drawn))
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times[1:]), statistics.mean(times[1:])  # the first step takes all prompts in


def main() -> None:
    print("| running | pages | waiting | prefix caching | median us | mean us |\n| --- | --- | --- | --- | --- | --- |")
    for running in (1, 64, 256, 1024, 4096):
        median, mean = measure(running, 1_000_000, 0, True)
        print(f"| {running} | 1,000,000 | 0 | on | {median:.0f} | {mean:.0f} |")
    for num_pages, waiting, caching in ((20_000, 0, True), (1_000_000, 100_000, True), (1_000_000, 0, False)):
        median, mean = measure(256, num_pages, waiting, caching)
        print(f"| 256 | {num_pages:,} | {waiting:,} | {'on' if caching else 'off'} | {median:.0f} | {mean:.0f} |")


if __name__ == "__main__":
    main()
