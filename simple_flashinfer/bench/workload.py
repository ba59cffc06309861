"""Runs requests through the engine and watches its steps from outside."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from simple_flashinfer.bench.cost import Cost, CostModel
from simple_flashinfer.config import BenchConfig, ConfigError
from simple_flashinfer.core.engine import EngineCore
from simple_flashinfer.engine.requests import RequestFactory
from simple_flashinfer.types import Add, EngineInfo, EngineOutput, ModelOutput, SamplingParams, SchedulerOutput

PARTS = ("scheduler", "inputs", "forward", "sampling", "waiting", "outputs")


@dataclass(slots=True)
class Step:
    """seconds: of the host, by part. inputs: the arrays of the batch and the attention plan; forward, sampling: until these
    are done, or queued for a device; waiting: for that device. busy: seconds of a GPU, from the start of the step's CUDA
    graph until its tokens are on their way; idle: since the step before. None where this step, or that one, replays none.
    """

    num_requests: int
    prompt_tokens: int
    cost: Cost
    seconds: dict[str, float]
    busy: float | None = None
    idle: float | None = None


class StepWatch:
    """Takes steps of an engine, and times their parts by standing around its own methods.

    Where steps overlap, the parts are of one step and the waiting is for the one before: on the whole it comes to the same.
    The clock then goes on between two steps, since the device does too; that time is counted to the outputs.
    """

    num_shared_tokens = 0  # at the start of all requests, with the same K/V

    def __init__(self, core: EngineCore, costs: CostModel) -> None:
        self._core = core
        self._costs = costs
        self._began: dict[str, float] = {}
        self._took: defaultdict[str, float] = defaultdict(float)
        self._ended = 0.0  # the last step
        self._done: list[SchedulerOutput] = []  # at most one
        self._replayed: Any = None  # event before the graph of the step that is being handed over
        self._on_device: deque[tuple[Any, Any] | None] = deque()  # events around each step in flight
        self._device_ended: Any = None  # event after the step before
        runner: Any = core.executor
        core_: Any = core
        self._stand_around(core.scheduler, "schedule")
        self._stand_around(runner, "execute", then=self._handed_over)
        self._stand_around(runner, "_logits", "forward")
        if runner._graphs is not None:
            self._stand_around(runner._graphs, "run", "forward")
            self._watch_replays(runner._graphs)
        update = core.scheduler.update

        def see(batch: SchedulerOutput, result: ModelOutput) -> list[EngineOutput]:
            self._done.append(batch)
            return update(batch, result)

        def fail(batch: SchedulerOutput, error: Exception) -> None:
            raise ConfigError(f"the engine failed in a step of {len(batch.rows)} requests: {error}")

        core_.scheduler.update, core_._on_failure = see, fail

    def _stand_around(
        self, owner: Any, method: str, name: str | None = None, then: Callable[[Any], None] = lambda result: None
    ) -> None:
        original, part = getattr(owner, method), name or method

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._began[part] = start = time.perf_counter()
            result = original(*args, **kwargs)
            self._took[part] += time.perf_counter() - start
            then(result)
            return result

        setattr(owner, method, timed)

    def _watch_replays(self, graphs: Any) -> None:
        def watched(replay: Any) -> Any:
            def noted() -> Any:
                self._replayed = _event()
                return replay()

            return noted

        capture = graphs._capture
        graphs._capture = lambda function: watched(capture(function))
        graphs._replays = {size: watched(replay) for size, replay in graphs._replays.items()}

    def _handed_over(self, running: Any) -> None:
        self._stand_around(running, "result", "waiting")
        self._on_device.append((self._replayed, _event()) if self._replayed is not None else None)
        self._replayed = None

    def _device_seconds(self) -> tuple[float | None, float | None]:
        """Busy and idle, of the step that was taken in."""
        events, before, self._device_ended = self._on_device.popleft(), self._device_ended, None
        if events is None:
            return None, None
        began, self._device_ended = events
        self._device_ended.synchronize()
        idle = before.elapsed_time(began) / 1e3 if before is not None else None
        return began.elapsed_time(self._device_ended) / 1e3, idle

    def step(self) -> tuple[Step, int]:
        """The step that was taken in, and how many tokens it brought. Raises ConfigError when it failed."""
        took, tokens, total = self._took, 0, 0.0
        took.clear()
        while not self._done:  # nothing is taken in when the first of overlapping steps is handed over
            start = self._ended if self._core._in_flight else time.perf_counter()
            outputs = self._core.step()
            self._ended = time.perf_counter()
            total += self._ended - start
            assert outputs is not None
            tokens += sum(len(output.token_ids) for output in outputs.outputs)
            if "execute" in took:
                took["inputs"] += self._began["forward"] - self._began.pop("execute", self._began["forward"])
        batch = self._done.pop()
        busy, idle = self._device_seconds()
        prompt_left = np.clip(batch.table.num_prompt_tokens[batch.rows] - batch.num_computed_tokens, 0, None)
        step = Step(
            num_requests=len(batch.rows),
            prompt_tokens=int(np.minimum(prompt_left, batch.num_scheduled_tokens).sum()),
            cost=self._costs.step(batch, self.num_shared_tokens),
            busy=busy,
            idle=idle,
            seconds={
                "scheduler": took["schedule"],
                "inputs": took["inputs"],
                "forward": took["forward"],
                "sampling": took["execute"] - took["inputs"] - took["forward"],
                "waiting": took["waiting"],
                "outputs": total - took["schedule"] - took["execute"] - took["waiting"],
            },
        )
        return step, tokens


def _event() -> Any:
    """Recorded in the stream of the engine's work."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class Workload:
    """Requests of one length, each with a prompt of its own, or a part of one, that all arrive at once."""

    def __init__(
        self,
        config: BenchConfig,
        core: EngineCore,
        info: EngineInfo,
        watch: StepWatch,
        rng: np.random.Generator | None = None,
    ) -> None:
        """rng: one for all workloads of an engine, or their prompts are the same and found in its cache; None makes one of
        the seed. Raises ConfigError, with the flag to change, when a batch could not run as one.
        """
        self._config, self._core, self._watch = config, core, watch
        self._vocab_size = info.vocab_size
        self._requests = RequestFactory(info, config.seed)
        self._rng = rng or np.random.default_rng(config.seed)
        self._prefix = self._tokens(config.shared_prefix_length)
        self._num_shared_pages = config.shared_prefix_length // info.page_size  # a page that is not full is not kept
        self._num_own = config.prompt_length - self._num_shared_pages * info.page_size
        for batch_size in config.batch_sizes:
            self._check(batch_size, info)

    def _check(self, batch_size: int, info: EngineInfo) -> None:
        config, size, shared = self._config, info.page_size, self._num_shared_pages
        prompt, output = config.prompt_length, config.output_length
        if prompt + output > info.max_model_len:
            raise ConfigError(
                f"--prompt_length {prompt} and --output_length {output} "
                f"are more than the context of {info.max_model_len} tokens"
            )
        if config.shared_prefix_length >= prompt:
            raise ConfigError(
                f"--shared_prefix_length {config.shared_prefix_length} must be less than --prompt_length {prompt}"
            )
        if config.shared_prefix_length and not config.prefix_caching:
            raise ConfigError("--shared_prefix_length needs --prefix_caching true")
        # the scheduler lets nobody in while those who run might need a page more each
        needed = shared + batch_size * (max(-(-(prompt + output) // size), -(-prompt // size) + 1) - shared)
        if needed > info.num_pages:
            raise ConfigError(
                f"--batch_sizes {batch_size}: the requests need {needed} pages of {size} tokens, and there are "
                f"{info.num_pages}; raise --kv_cache_memory, or make batch or lengths smaller"
            )
        if self.prefill_steps(batch_size) >= output:
            raise ConfigError(
                f"--batch_sizes {batch_size}: the first answers would end before the last prompts are computed; "
                "raise --output_length or --max_num_batched_tokens"
            )

    def prefill_steps(self, batch_size: int) -> int:
        """Steps until all prompts are computed, at most."""
        tokens, budget = batch_size * self._num_own, self._config.max_num_batched_tokens
        return 1 if tokens <= budget else -(-tokens // max(budget - batch_size, 1))

    def warm_up_length(self, batch_size: int) -> int:
        """Tokens of answers until each kind of step has been taken: kernels and graphs are made at first use."""
        return min(self.prefill_steps(batch_size) + 2, self._config.output_length)

    def run(self, batch_size: int, output_length: int) -> Iterator[tuple[Step, int]]:
        """Each step, and how many tokens it brought."""
        self._watch.num_shared_tokens = 0
        if self._prefix:
            self._add(self._prefix, 1)
            while self._core.has_work:
                self._watch.step()
            self._watch.num_shared_tokens = self._config.prompt_length - self._num_own
        for _ in range(batch_size):
            self._add(self._prefix + self._tokens(self._config.prompt_length - len(self._prefix)), output_length)
        while self._core.has_work:
            yield self._watch.step()

    def _add(self, prompt: list[int], output_length: int) -> None:
        params = SamplingParams(max_tokens=output_length, temperature=self._config.temperature, ignore_eos=True)
        self._core.apply([Add(self._requests.make(prompt, params))])

    def _tokens(self, count: int) -> list[int]:
        return self._rng.integers(self._vocab_size, size=count).tolist()  # type: ignore[no-any-return]
