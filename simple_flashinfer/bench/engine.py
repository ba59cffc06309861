"""An engine under watch, on a machine whose limits are known."""

from collections.abc import Callable

import numpy as np

from simple_flashinfer.bench.cost import CostModel
from simple_flashinfer.bench.machine import describe, measure_bandwidth
from simple_flashinfer.bench.report import Result
from simple_flashinfer.bench.workload import StepWatch, Workload
from simple_flashinfer.config import BenchConfig, ConfigError
from simple_flashinfer.engine.launch import build_engine, resolve_model
from simple_flashinfer.model.loader import resolve_device
from simple_flashinfer.model.runner import ModelRunner


class WatchedEngine:
    def __init__(self, config: BenchConfig) -> None:
        """Measures the machine, then loads the model. Raises ConfigError, in a sentence, when it can't be done."""
        device = resolve_device(config)
        if config.overlap and device.type == "cpu":
            raise ConfigError("--overlap true: on the cpu the parts of a step are timed one after the other; leave it out")
        bandwidth = measure_bandwidth(device)
        self.core, self._info = build_engine(config, resolve_model(config))
        assert isinstance(self.core.executor, ModelRunner)
        model, self.backend = self.core.executor.model, self.core.executor.backend
        costs = CostModel(model, list(self.backend.layers.values()), self.backend.kv_dtype)
        self._watch = StepWatch(self.core, costs)
        self._rng = np.random.default_rng(config.seed)
        self.machine = describe(device, next(model.parameters()).dtype, bandwidth)
        self.model = costs.describe() | {"class": type(model).__name__, "device": device.type}

    def workload(self, config: BenchConfig) -> Workload:
        """Other lengths than at the start may be asked for. Raises ConfigError, with the flag to change."""
        return Workload(config, self.core, self._info, self._watch, self._rng)

    def measure(
        self, workload: Workload, batch_size: int, output_length: int, on_tokens: Callable[[int], object] = lambda n: None
    ) -> Result:
        """One run. on_tokens: called after each step with the number of tokens that it brought."""
        steps = []
        for step, tokens in workload.run(batch_size, output_length):
            steps.append(step)
            on_tokens(tokens)
        return Result.of(batch_size, batch_size * output_length, steps, self.machine)
