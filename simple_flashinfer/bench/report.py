"""From steps to figures, and from figures to what a person reads."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from simple_flashinfer.bench.machine import Machine
from simple_flashinfer.bench.workload import PARTS, Step
from simple_flashinfer.config import BenchConfig

MEMORY, COMPUTE = "memory bandwidth", "matmul rate"
_REST = {
    "scheduler": "the scheduler's",
    "inputs": "the preparation of inputs",
    "forward": "the forward pass beyond the limit",
    "sampling": "sampling",
    "waiting": "the device's work beyond the limit",
    "outputs": "the taking in of outputs",
}


_QUIET = 0.02  # waiting for a core that is no reason to measure again, as a share of the time


@dataclass(frozen=True, slots=True)
class Phase:
    """Sums over the steps of a phase. tokens: of prompts in prefill, of answers in decode; bytes and flops are the least."""

    num_steps: int
    tokens: int
    seconds: float
    seconds_by_part: dict[str, float]
    bytes: float
    flops: float
    limit_seconds: float
    bound_by: str
    tokens_per_second: float
    share_of_limit: float
    device_idle: float | None  # share of a GPU's time between steps that replay CUDA graphs; None where none do

    @classmethod
    def of(cls, steps: Sequence[Step], tokens: int, machine: Machine) -> "Phase":
        bytes_, flops = (sum(getattr(step.cost, name) for step in steps) for name in ("bytes", "flops"))
        limit = sum(max(step.cost.bytes / machine.bandwidth, step.cost.flops / machine.matmul_rate) for step in steps)
        parts = {part: sum(step.seconds[part] for step in steps) for part in PARTS}
        seconds = sum(parts.values())
        on_device = [(step.idle, step.busy) for step in steps if step.idle is not None and step.busy is not None]
        return cls(
            num_steps=len(steps),
            tokens=tokens,
            seconds=seconds,
            seconds_by_part=parts,
            bytes=bytes_,
            flops=flops,
            limit_seconds=limit,
            bound_by=MEMORY if bytes_ / machine.bandwidth >= flops / machine.matmul_rate else COMPUTE,
            tokens_per_second=tokens / seconds,
            share_of_limit=limit / seconds,
            device_idle=sum(idle for idle, _ in on_device) / sum(map(sum, on_device)) if on_device else None,
        )


@dataclass(frozen=True, slots=True)
class Result:
    """prefill: steps with tokens of prompts, among them decodes of requests that began earlier; decode: steps of the whole
    batch with none.
    """

    batch_size: int
    output_tokens_per_second: float  # over the whole run
    prefill: Phase
    decode: Phase

    @classmethod
    def of(cls, batch_size: int, output_tokens: int, steps: Sequence[Step], machine: Machine) -> "Result":
        prefill = [step for step in steps if step.prompt_tokens]
        decode = [step for step in steps if not step.prompt_tokens and step.num_requests == batch_size]
        return cls(
            batch_size=batch_size,
            output_tokens_per_second=output_tokens / sum(sum(step.seconds.values()) for step in steps),
            prefill=Phase.of(prefill, sum(step.prompt_tokens for step in prefill), machine),
            decode=Phase.of(decode, batch_size * len(decode), machine),
        )


@dataclass(frozen=True, slots=True)
class Report:
    """seconds: of all runs; seconds_without_core: of its threads together, while others had the cores."""

    config: BenchConfig
    machine: Machine
    model: dict[str, Any]
    results: list[Result]
    seconds: float
    seconds_without_core: float

    def as_json(self) -> dict[str, Any]:
        saved = asdict(self)
        settings = saved.pop("config")
        return saved | {"settings": {name: value for name, value in settings.items() if name not in self.config.LEFT_OUT}}

    def as_text(self) -> str:
        return "\n".join([*self._head(), "", *self._tables(), "", *map(what_holds_back, self.results), *self._notes()])

    def _head(self) -> list[str]:
        config, machine, model = self.config, self.machine, self.model
        versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
        shared = f", the first {config.shared_prefix_length} the same in all" * bool(config.shared_prefix_length)
        return [
            f"machine   {machine.device}; cores: {machine.num_cores}, threads: {machine.num_threads}; {versions}",
            f"limits    {si(machine.bandwidth)}B/s of memory, {si(machine.matmul_rate)}FLOP/s in {machine.matmul_dtype}, "
            "as measured",
            f"model     {config.model} ({model['class']}): {si(model['weight_bytes'])}B of weights, "
            f"{si(model['kv_bytes_per_token'])}B of K/V a token, on {model['device']}",
            f"requests  {config.prompt_length} tokens of prompt{shared}, {config.output_length} of answer, all at once",
        ]

    def _tables(self) -> list[str]:
        speed = [
            ["", "prefill", "", "", "decode", "", "", ""],
            ["requests", "tokens/s", "of limit", "bound by", "tokens/s", "of limit", "bound by", "ms/step"],
        ]
        where = [["requests", *PARTS, "in all", "limit"]]
        for r in self.results:
            size, decode = str(r.batch_size), r.decode
            seconds = *decode.seconds_by_part.values(), decode.seconds, decode.limit_seconds
            speed.append([size, *_speed(r.prefill), *_speed(decode), _ms(decode, decode.seconds)])
            where.append([size, *(_ms(decode, s) for s in seconds)])
        return [*_table(speed), "", "where the time of a decode step goes, ms", *_table(where)]

    def _notes(self) -> list[str]:
        notes = []
        smallest, cache = min(r.decode.bytes / r.decode.num_steps for r in self.results), self.machine.cache_bytes
        if smallest < cache:
            notes.append(
                f"A step reads {si(smallest)}B or more, which a cache of {si(cache)}B may hold: "
                "it is faster than memory, so the true limit is higher."
            )
        if self.seconds_without_core > _QUIET * self.seconds:
            notes.append(
                f"In {self.seconds:.1f} s the threads waited {self.seconds_without_core:.1f} s for a core that others had: "
                "measure again when the machine is quiet."
            )
        return notes


def what_holds_back(result: Result) -> str:
    """One sentence or two on the decode steps."""
    decode = result.decode
    beyond = dict(decode.seconds_by_part)
    model_runs_in = "waiting" if beyond["waiting"] > beyond["forward"] else "forward"  # on a device, or on this processor
    beyond[model_runs_in] -= decode.limit_seconds
    rest = decode.seconds - decode.limit_seconds
    worst = max(beyond, key=lambda part: beyond[part])
    text = f"Decode at {_plural(result.batch_size)}: {_percent(decode.share_of_limit)} of what {decode.bound_by} allows."
    if decode.device_idle is not None:
        text += f" Between steps the GPU idles {_percent(decode.device_idle)} of the time."
    if rest <= 0:
        return text
    amount = "Most" if beyond[worst] > rest / 2 else "The largest part"
    return f"{text} {amount} of the rest, {_ms(decode, beyond[worst])} of {_ms(decode, rest)} ms, is {_REST[worst]}."


def si(value: float) -> str:
    """With the prefix of a unit: 1234 is '1.23 k'."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5 or prefix == "T":
            break
        value /= 1000
    return f"{value:.3g} {prefix}"


def _plural(requests: int) -> str:
    return f"{requests} request" + "s" * (requests > 1)


def _speed(phase: Phase) -> list[str]:
    return [f"{phase.tokens_per_second:,.0f}", _percent(phase.share_of_limit), phase.bound_by]


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def _ms(phase: Phase, seconds: float) -> str:
    return f"{seconds / phase.num_steps * 1e3:.2f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
