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
    from simple_flashinfer.bench.engine import WatchedEngine
    from simple_flashinfer.bench.machine import seconds_without_core
    from simple_flashinfer.bench.report import Report

    engine = WatchedEngine(config)
    workload = engine.workload(config)

    results = []
    start, waited = time.perf_counter(), seconds_without_core()
    lengths = {size: (workload.warm_up_length(size), config.output_length) for size in config.batch_sizes}
    with tqdm(total=sum(size * sum(both) for size, both in lengths.items()), unit="token") as bar:
        for size, (warm_up, length) in lengths.items():
            bar.set_description(f"batch of {size}, warm-up")
            for _, tokens in workload.run(size, warm_up):
                bar.update(tokens)
            bar.set_description(f"batch of {size}, measured")
            results.append(engine.measure(workload, size, length, bar.update))
    seconds, waited = time.perf_counter() - start, seconds_without_core() - waited
    engine.core.executor.shutdown()

    report = Report(config, engine.machine, engine.model, results, seconds, waited)
    print(report.as_text())
    if config.save:
        try:
            Path(config.save).write_text(json.dumps(report.as_json(), indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"can't write --save {config.save}: {error.strerror or error}") from error
