"""Sends conversations to a server, so many at a time (closed loop) or so many a second (open loop), and watches itself."""

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count, islice

from benchmark.metrics import PointResult, Record, distribution, summarize
from benchmark.target import Target
from benchmark.workload import Conversation, arrival_times

_TICK = 0.02
_BUSY = 0.8
_SHORTEST = 0.5  # s; in less, a share of CPU says nothing


@dataclass(frozen=True)
class Load:
    """concurrency: closed loop, so many conversations under way at any time. rps: open loop, so many begun a second on
    average, whether or not earlier ones have ended. conversations, duration (s): whichever ends first; after that none is
    begun, and those under way are waited for.
    """

    concurrency: int | None = None
    rps: float | None = None
    arrivals: str = "poisson"
    burstiness: float = 1.0
    conversations: int | None = None
    duration: float | None = None
    warmup: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rps is None):
            raise ValueError("a load has either a concurrency or a rate")
        if self.conversations is None and self.duration is None:
            raise ValueError("a load needs an end: a number of conversations, or a duration")

    @property
    def label(self) -> str:
        return f"concurrency {self.concurrency}" if self.rps is None else f"{self.rps:g} requests/s"


async def run_point(
    target: Target,
    source: Iterator[Conversation],
    load: Load,
    *,
    slo: dict[str, float] | None = None,
    max_lag: float = 20,
    on_end: Callable[[], object] = lambda: None,
) -> PointResult:
    """Measures one server under one load, after `load.warmup` conversations that are not measured.

    max_lag: p99 in ms of the client's own lateness from which the result is marked. on_end: called after each conversation.
    """
    warmup = Load(concurrency=min(load.warmup, load.concurrency or load.warmup) or 1, conversations=load.warmup)
    warm = summarize(await _send_all(target, source, warmup, lambda: None))
    lags: list[float] = []
    async with _watched(lags):
        wall, cpu = time.perf_counter(), time.process_time()
        records = await _send_all(target, source, load, on_end)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    result = summarize(records, slo)
    result.lag, result.client_cpu = distribution(lags), cpu / wall
    if load.rps is not None:
        result.late = distribution(record.late * 1e3 for record in records)
    result.failed += warm.failed
    result.errors += [f"warm-up: {error}" for error in warm.errors]
    result.invalid += [f"warm-up: {complaint}" for complaint in warm.invalid]
    _warn(result, max_lag)
    return result


def _warn(result: PointResult, max_lag: float) -> None:
    for name, what in ((result.lag, "event loop was"), (result.late, "requests were")):
        if name is not None and name["p99"] > max_lag:
            result.lagging = True
            result.warnings.append(f"the load generator can't keep up: its {what} {name['p99']:.0f} ms late (p99)")
    if result.client_cpu > _BUSY and result.duration > _SHORTEST:
        result.lagging = True
        result.warnings.append(f"the load generator can't keep up: it used {result.client_cpu:.0%} of a core")
    if result.short:
        result.warnings.append(f"{result.short} of {result.completed} answers were shorter than asked for")
    if repeated := sum(record.repeated for record in result.records):
        result.warnings.append(f"{repeated} prompts were sent before: the file has too few conversations")


async def _send_all(
    target: Target, source: Iterator[Conversation], load: Load, on_end: Callable[[], object]
) -> list[Record]:
    records: list[Record] = []
    numbers = count()
    start = time.perf_counter()
    todo = islice(source, load.conversations)

    def time_is_left(when: float) -> bool:
        return load.duration is None or when - start < load.duration

    async def converse(conversation: Conversation, due: float | None = None) -> None:
        texts: list[str] = []
        for turn in conversation:
            texts.append(turn.text)
            number = next(numbers)
            exchange = await target.send(texts, turn.output_length)
            late = 0.0 if due is None else exchange.started - due
            records.append(Record(number, exchange, turn.output_length, turn.prompt_tokens, late, turn.repeated))
            due = None
            if turn is not conversation[-1]:  # only then is an answer read while others are under way
                if exchange.reply.error is not None:
                    break
                texts.append(exchange.reply.text)
        on_end()

    async def client() -> None:
        while time_is_left(time.perf_counter()) and (conversation := next(todo, None)) is not None:
            await converse(conversation)

    async with asyncio.TaskGroup() as group:
        if load.concurrency is not None:
            for _ in range(load.concurrency):
                group.create_task(client())
            return records
        for after in arrival_times(load.rps or 1, load.arrivals, load.burstiness, load.seed):
            due = start + after
            if not time_is_left(due) or (conversation := next(todo, None)) is None:
                break
            await asyncio.sleep(due - time.perf_counter())
            group.create_task(converse(conversation, due))
    return records


@asynccontextmanager
async def _watched(lags: list[float]) -> AsyncIterator[None]:
    """Collects meanwhile by how many ms a task that wants to run every 20 ms comes too late. No garbage is collected."""

    async def tick() -> None:
        while True:
            due = time.perf_counter() + _TICK
            await asyncio.sleep(_TICK)
            lags.append(max(0.0, time.perf_counter() - due) * 1e3)

    ticking = asyncio.create_task(tick())
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        ticking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ticking
