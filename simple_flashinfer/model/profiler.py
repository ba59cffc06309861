"""`--torch_profiling`: a bounded number of torch profiler traces of engine steps, to open in https://ui.perfetto.dev."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

_FOLDER = Path("traces")
_TRACES = 3
_SKIP, _WARM_UP, _STEPS = 20, 2, 8  # before each trace; its steps


class StepProfiler:
    """Traces _STEPS steps, _TRACES times, _SKIP steps apart; after that, or when not enabled, costs nothing."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._profiler: Any = None
        self._written = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        if not self._enabled:
            yield
            return
        if self._profiler is None:  # here, since a profiler sees the thread that starts it
            self._profiler = torch.profiler.profile(
                schedule=torch.profiler.schedule(wait=_SKIP, warmup=_WARM_UP, active=_STEPS, repeat=_TRACES),
                acc_events=True,
                on_trace_ready=self._write,
            )
            self._profiler.start()
        yield
        self._profiler.step()
        if self._written == _TRACES:
            self.close()

    def _write(self, profiler: Any) -> None:
        self._written += 1
        path = _FOLDER / f"steps-{self._written}.json"
        try:
            _FOLDER.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # no reason to fail anybody's request
            logger.warning("Can't write %s: %s", path, error)
            return
        logger.info("Wrote %s (%d of %d); open it in https://ui.perfetto.dev", path, self._written, _TRACES)

    def close(self) -> None:
        if self._profiler is not None:
            self._enabled = False
            profiler, self._profiler = self._profiler, None
            profiler.stop()
