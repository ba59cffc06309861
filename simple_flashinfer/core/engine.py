"""The engine: commands in, one step at a time, outputs out. Synchronous and single-threaded.

A step that fails changes nothing: no request's `num_computed_tokens` moves, so it can simply be tried again. When
several requests were in it, each is tried alone; the one that fails alone is to blame and gets the error, the others
never notice. Only an EngineDeadError (the device is lost) ends the engine.
"""

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from simple_flashinfer.core.scheduler import Scheduler
from simple_flashinfer.types import (
    Abort,
    Add,
    Command,
    EngineDeadError,
    EngineOutput,
    FinishReason,
    ModelOutput,
    SchedulerOutput,
    StepOutputs,
    Stop,
)

logger = logging.getLogger(__name__)


class Executor(Protocol):
    """Runs the model. `execute` may raise, or its future may: EngineDeadError when nothing more can be run."""

    def execute(self, batch: SchedulerOutput) -> Future[ModelOutput]: ...

    def shutdown(self) -> None: ...


class EngineCore:
    def __init__(self, scheduler: Scheduler, executor: Executor, check_when_idle: bool = False) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.stopped = False
        self._check_when_idle = check_when_idle
        self._suspects: deque[str] = deque()  # were in a step that failed: each runs alone once
        self._outputs: list[EngineOutput] = []  # to be told with the next step

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_requests or bool(self._outputs)

    def apply(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Add):
                try:
                    self.scheduler.add(command.request)
                except ValueError as error:
                    self._fail(command.request.request_id, str(error))
            elif isinstance(command, Abort):
                if self.scheduler.abort(command.request_id):
                    self._outputs.append(EngineOutput(command.request_id, (), FinishReason.ABORT))
            elif isinstance(command, Stop):
                self.stopped = True

    def step(self) -> StepOutputs | None:
        """One step. None when there was nothing to do."""
        if not self.has_work:
            return None
        batch = self.scheduler.schedule(only=self._next_suspect())
        if batch is not None:
            try:
                result = self.executor.execute(batch).result()
            except EngineDeadError:
                raise
            except Exception as error:
                self._on_failure(batch, error)
            else:
                if self._suspects:
                    self._suspects.popleft()
                self._outputs += self.scheduler.update(batch, result)
        outputs, self._outputs = self._outputs, []
        if self._check_when_idle and not self.scheduler.has_requests:
            self.scheduler.check()
        return StepOutputs(outputs, self.scheduler.stats())

    def _next_suspect(self) -> str | None:
        while self._suspects and not self.scheduler.is_running(self._suspects[0]):
            self._suspects.popleft()  # left meanwhile
        return self._suspects[0] if self._suspects else None

    def _on_failure(self, batch: SchedulerOutput, error: Exception) -> None:
        request_ids = self.scheduler.ids_of(batch)
        if len(request_ids) > 1:
            logger.warning("A step of %d requests failed (%r); trying each alone.", len(request_ids), error)
            self._suspects.extend(request_ids)
            return
        logger.error("Request %s failed.", request_ids[0], exc_info=error)
        self.scheduler.abort(request_ids[0])
        self._fail(request_ids[0], f"The engine failed on this request: {type(error).__name__}")

    def _fail(self, request_id: str, message: str) -> None:
        self._outputs.append(EngineOutput(request_id, (), FinishReason.ERROR, message))
