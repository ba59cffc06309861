"""Runs requests through the engine and watches its steps from outside."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from simple_flashinfer.bench.cost import Cost, CostModel
from simple_flashinfer.config import BenchConfig, ConfigError
from simple_flashinfer.core.engine import EngineCore
from simple_flashinfer.engine.requests import RequestFactory
from simple_flashinfer.types import Add, EngineInfo, EngineOutput, ModelOutput, SamplingParams, SchedulerOutput

PARTS = ("scheduler", "inputs", "forward", "sampling", "waiting", "outputs")


@dataclass(slots=True)
class Step:
    """seconds: of the host, by part. inputs: the arrays of the batch and the attention plan; forward, sampling: until these
    are done, or queued for a device; waiting: for that device.
    """

    num_requests: int
    prompt_tokens: int
    cost: Cost
    seconds: dict[str, float]


class StepWatch:
    """Takes steps of an engine, and times their parts by standing around its own methods.

    Where steps overlap, the parts are of one step and the waiting is for the one before: on the whole it comes to the same.
    """

    def __init__(self, core: EngineCore, costs: CostModel) -> None:
        self._core = core
        self._costs = costs
        self._began: dict[str, float] = {}
        self._took: defaultdict[str, float] = defaultdict(float)
        self._done: list[SchedulerOutput] = []  # at most one
        runner: Any = core.executor
        core_: Any = core
        self._stand_around(core.scheduler, "schedule")
        self._stand_around(runner, "execute", then=lambda running: self._stand_around(running, "result", "waiting"))
        self._stand_around(runner, "_logits", "forward")
        if runner._graphs is not None:
            self._stand_around(runner._graphs, "run", "forward")
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

    def step(self) -> tuple[Step, int]:
        """The step that was taken in, and how many tokens it brought. Raises ConfigError when it failed."""
        took, tokens, total = self._took, 0, 0.0
        took.clear()
        while not self._done:  # nothing is taken in when the first of overlapping steps is handed over
            start = time.perf_counter()
            outputs = self._core.step()
            total += time.perf_counter() - start
            assert outputs is not None
            tokens += sum(len(output.token_ids) for output in outputs.outputs)
            if "execute" in took:
                took["inputs"] += self._began["forward"] - self._began.pop("execute", self._began["forward"])
        batch = self._done.pop()
        prompt_left = np.clip(batch.table.num_prompt_tokens[batch.rows] - batch.num_computed_tokens, 0, None)
        step = Step(
            num_requests=len(batch.rows),
            prompt_tokens=int(np.minimum(prompt_left, batch.num_scheduled_tokens).sum()),
            cost=self._costs.step(batch),
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


class Workload:
    """Requests of one length, each with a prompt of its own, that all arrive at once."""

    def __init__(self, config: BenchConfig, core: EngineCore, info: EngineInfo, watch: StepWatch) -> None:
        """Raises ConfigError, with the flag to change, when a batch could not run as one."""
        self._config, self._core, self._watch = config, core, watch
        self._vocab_size = info.vocab_size
        self._requests = RequestFactory(info, config.seed)
        self._rng = np.random.default_rng(config.seed)
        for batch_size in config.batch_sizes:
            self._check(batch_size, info)

    def _check(self, batch_size: int, info: EngineInfo) -> None:
        config, size = self._config, info.page_size
        prompt, output = config.prompt_length, config.output_length
        if prompt + output > info.max_model_len:
            raise ConfigError(
                f"--prompt_length {prompt} and --output_length {output} "
                f"are more than the context of {info.max_model_len} tokens"
            )
        # the scheduler lets nobody in while those who run might need a page more each
        needed = batch_size * max(-(-(prompt + output) // size), -(-prompt // size) + 1)
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
        tokens, budget = batch_size * self._config.prompt_length, self._config.max_num_batched_tokens
        return 1 if tokens <= budget else -(-tokens // max(budget - batch_size, 1))

    def warm_up_length(self, batch_size: int) -> int:
        """Tokens of answers until each kind of step has been taken: kernels and graphs are made at first use."""
        return min(self.prefill_steps(batch_size) + 2, self._config.output_length)

    def run(self, batch_size: int, output_length: int) -> Iterator[tuple[Step, int]]:
        """Each step, and how many tokens it brought."""
        params = SamplingParams(max_tokens=output_length, ignore_eos=True)
        for _ in range(batch_size):
            prompt = self._rng.integers(self._vocab_size, size=self._config.prompt_length).tolist()
            self._core.apply([Add(self._requests.make(prompt, params))])
        while self._core.has_work:
            yield self._watch.step()
