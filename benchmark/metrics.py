"""What the figures mean. Names and definitions are those of `vllm bench serve`, so that they can be compared.

All are of the client's clock. n is the output's number of tokens by the server's usage.

ttft        time to first token: from the start of sending until the first chunk that carries any of the answer. A chunk
            with a role and no text does not count; opening a connection, where none was idle, does.
e2e         end to end: from the start of sending until the last chunk of the answer.
tpot        time per output token after the first: (e2e - ttft) / (n - 1), one figure a request; none for n = 1.
itl         inter-token latency: the gaps between chunks, all requests' in one pool. A server that sends several tokens in a
            chunk has fewer and longer gaps: compare by tpot.
throughput  requests, output tokens, and prompt + output tokens of successful requests, by the time from the first request's
            start to the last one's end.
goodput     successful requests per second that meet every bound of the SLO.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from benchmark.client import Exchange

TIMES = ("ttft", "tpot", "itl", "e2e")


@dataclass(frozen=True)
class Record:
    """One request: what was asked, and what came of it. late: seconds between the time it was due and its start."""

    number: int
    exchange: Exchange
    output_length: int
    prompt_tokens: int | None = None
    late: float = 0.0
    repeated: bool = False

    def complaint(self) -> str | None:
        """Why this answer can't be trusted as a measurement; None if it can."""
        reply, name = self.exchange.reply, f"request {self.number}"
        if reply.prompt_tokens is None or reply.output_tokens is None:
            return f"{name}: the server sent no usage; without it nothing can be counted"
        if self.prompt_tokens is not None and reply.prompt_tokens != self.prompt_tokens:
            return f"{name}: {reply.prompt_tokens} prompt tokens by the server's usage, {self.prompt_tokens} were asked for"
        if reply.output_tokens > self.output_length:
            return f"{name}: {reply.output_tokens} output tokens by the server's usage, max_tokens was {self.output_length}"
        if len(reply.chunk_times) > reply.output_tokens:
            return f"{name}: {len(reply.chunk_times)} chunks of text, but {reply.output_tokens} output tokens by usage"
        return None

    def times(self) -> dict[str, float]:
        """ttft, e2e and, for more than one token, tpot, in ms."""
        reply, start = self.exchange.reply, self.exchange.started
        first = reply.chunk_times[0] if reply.chunk_times else reply.end
        times = {"ttft": (first - start) * 1e3, "e2e": (reply.end - start) * 1e3}
        if reply.output_tokens is not None and reply.output_tokens > 1:
            times["tpot"] = (reply.end - first) / (reply.output_tokens - 1) * 1e3
        return times

    def gaps(self) -> list[float]:
        """itl, in ms."""
        return [float(gap) for gap in np.diff(self.exchange.reply.chunk_times) * 1e3]

    def as_json(self) -> dict[str, Any]:
        reply = self.exchange.reply
        return {
            "number": self.number,
            "started": self.exchange.started,
            "late_ms": self.late * 1e3,
            "prompt_tokens": reply.prompt_tokens,
            "output_tokens": reply.output_tokens,
            "error": reply.error,
            **({} if reply.error else {**self.times(), "itl": self.gaps()}),
        }


def distribution(values: Iterable[float]) -> dict[str, float] | None:
    """Mean and percentiles, linear between neighbours as numpy's; None of nothing."""
    data = np.fromiter(values, float)
    if not len(data):
        return None
    p50, p90, p99 = np.percentile(data, (50, 90, 99))
    return {"mean": float(data.mean()), "p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(data.max())}


@dataclass
class PointResult:
    """One server under one load. Times are in ms, rates a second, `duration` in s.

    failed: answers that were an error or broke off. short: complete, but with fewer tokens than asked for. invalid: why the
    measurement does not hold. lag: by how much the client's own event loop was late, and late: its requests (open loop).
    """

    completed: int = 0
    failed: int = 0
    short: int = 0
    duration: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    request_throughput: float = 0.0
    output_throughput: float = 0.0
    total_throughput: float = 0.0
    goodput: float | None = None
    times: dict[str, dict[str, float] | None] = field(default_factory=dict)
    lag: dict[str, float] | None = None
    late: dict[str, float] | None = None
    client_cpu: float = 0.0  # share of one core
    lagging: bool = False
    errors: list[str] = field(default_factory=list)  # the first few
    invalid: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list, repr=False)

    def as_json(self, requests: bool = False) -> dict[str, Any]:
        records, self.records = self.records, []
        try:
            plain = asdict(self)
        finally:
            self.records = records
        del plain["records"]
        return plain | ({"requests": [record.as_json() for record in records]} if requests else {})


def summarize(records: Sequence[Record], slo: dict[str, float] | None = None) -> PointResult:
    """slo: bounds in ms for ttft, tpot and e2e."""
    good = [record for record in records if record.exchange.reply.error is None]
    bad = [record for record in records if record.exchange.reply.error is not None]
    complaints = [complaint for record in good if (complaint := record.complaint())]
    result = PointResult(completed=len(good), failed=len(bad), records=list(records), invalid=complaints[:5])
    result.errors = list(dict.fromkeys(str(record.exchange.reply.error) for record in bad))[:5]
    if len(complaints) > len(result.invalid):
        result.invalid.append(f"and {len(complaints) - len(result.invalid)} more")
    if not good:
        return result
    replies = [record.exchange.reply for record in good]
    result.duration = max(reply.end for reply in replies) - min(record.exchange.started for record in records)
    result.prompt_tokens = sum(reply.prompt_tokens or 0 for reply in replies)
    result.output_tokens = sum(reply.output_tokens or 0 for reply in replies)
    if any(reply.cached_tokens is not None for reply in replies):
        result.cached_tokens = sum(reply.cached_tokens or 0 for reply in replies)
    result.short = sum((record.exchange.reply.output_tokens or 0) < record.output_length for record in good)
    result.request_throughput = len(good) / result.duration
    result.output_throughput = result.output_tokens / result.duration
    result.total_throughput = (result.prompt_tokens + result.output_tokens) / result.duration
    times = [record.times() for record in good]
    pools = {name: [each[name] for each in times if name in each] for name in TIMES}
    pools["itl"] = [gap for record in good for gap in record.gaps()]
    result.times = {name: distribution(pool) for name, pool in pools.items()}
    if slo:
        met = sum(all(each.get(name, 0.0) <= bound for name, bound in slo.items()) for each in times)
        result.goodput = met / result.duration
    return result
