"""The command: measure the machine, load the model, run each batch size, tell."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from simple_flashinfer.config import BenchConfig, ConfigError, load_settings
from simple_flashinfer.log import set_up_logging


def bench(argv: Sequence[str]) -> None:
    """Prints a report. Raises ConfigError, in a sentence, when it can't be run."""
    config = load_settings(BenchConfig, argv)
    set_up_logging(config.loglevel)
    if (largest := max(config.batch_sizes)) > config.max_sequence:
        raise ConfigError(f"--batch_sizes {largest} is more than --max_sequence {config.max_sequence}")
    if config.save and (Path(config.save).is_dir() or not Path(config.save).parent.is_dir()):
        raise ConfigError(f"--save {config.save}: there is no folder for such a file")  # before minutes are spent
    from simple_flashinfer.bench.cost import CostModel
    from simple_flashinfer.bench.machine import describe, measure_bandwidth, seconds_without_core
    from simple_flashinfer.bench.report import Report, Result
    from simple_flashinfer.bench.workload import StepWatch, Workload
    from simple_flashinfer.engine.launch import build_engine, resolve_model
    from simple_flashinfer.model.loader import resolve_device
    from simple_flashinfer.model.runner import ModelRunner

    device = resolve_device(config)
    if config.overlap and device.type == "cpu":
        raise ConfigError("--overlap true: on the cpu the parts of a step are timed one after the other; leave it out")
    bandwidth = measure_bandwidth(device)
    core, info = build_engine(config, resolve_model(config))
    assert isinstance(core.executor, ModelRunner)
    model, backend = core.executor.model, core.executor.backend
    costs = CostModel(model, list(backend.layers.values()), backend.kv_dtype)
    workload = Workload(config, core, info, StepWatch(core, costs))
    machine = describe(device, next(model.parameters()).dtype, bandwidth)

    results = []
    start, waited = time.perf_counter(), seconds_without_core()
    lengths = {size: (workload.warm_up_length(size), config.output_length) for size in config.batch_sizes}
    with tqdm(total=sum(size * sum(both) for size, both in lengths.items()), unit="token") as bar:
        for size, (warm_up, length) in lengths.items():
            for output_length, kind in ((warm_up, "warm-up"), (length, "measured")):
                bar.set_description(f"batch of {size}, {kind}")
                steps = []
                for step, tokens in workload.run(size, output_length):
                    steps.append(step)
                    bar.update(tokens)
            results.append(Result.of(size, size * length, steps, machine))
    seconds, waited = time.perf_counter() - start, seconds_without_core() - waited
    core.executor.shutdown()

    described = costs.describe() | {"class": type(model).__name__, "device": device.type}
    report = Report(config, machine, described, results, seconds, waited)
    print(report.as_text())
    if config.save:
        try:
            Path(config.save).write_text(json.dumps(report.as_json(), indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"can't write --save {config.save}: {error.strerror or error}") from error
