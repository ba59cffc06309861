"""The engine: commands in, one step at a time, outputs out. Synchronous and single-threaded.

A step that fails changes nothing: no request's `num_computed_tokens` moves, so it can simply be tried again. When
several requests were in it, each is tried alone; the one that fails alone is to blame and gets the error, the others
never notice. Only an EngineDeadError (the device is lost) ends the engine.

A request with a grammar waits outside of the scheduler until the executor has compiled it, so that it holds up nobody.
"""

import logging
import time
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
    EngineRequest,
    FinishReason,
    ModelOutput,
    RequestFailedError,
    SchedulerOutput,
    StepOutputs,
    Stop,
)

logger = logging.getLogger(__name__)


class Executor(Protocol):
    """Runs the model. `execute` may raise, or its future may: EngineDeadError when nothing more can be run."""

    def execute(self, batch: SchedulerOutput) -> Future[ModelOutput]: ...

    def prepare(self, request: EngineRequest) -> "Preparation":
        """Begins, in the background, what a request with a grammar needs before it is scheduled."""

    def shutdown(self) -> None: ...


class Preparation(Protocol):
    error: str | None  # why it failed, once it is ready

    @property
    def ready(self) -> bool: ...


_POLL_SECONDS = 1e-3


class EngineCore:
    def __init__(self, scheduler: Scheduler, executor: Executor, check_when_idle: bool = False) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.stopped = False
        self._check_when_idle = check_when_idle
        self._suspects: deque[str] = deque()  # were in a step that failed: each runs alone once
        self._preparing: dict[str, tuple[EngineRequest, Preparation]] = {}
        self._outputs: list[EngineOutput] = []  # to be told with the next step

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_requests or bool(self._outputs) or bool(self._preparing)

    def apply(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Add):
                if command.request.params.grammar:
                    self._preparing[command.request.request_id] = command.request, self.executor.prepare(command.request)
                else:
                    self._add(command.request)
            elif isinstance(command, Abort):
                waited = self._preparing.pop(command.request_id, None) is not None
                if self.scheduler.abort(command.request_id) or waited:
                    self._outputs.append(EngineOutput(command.request_id, (), FinishReason.ABORT))
            elif isinstance(command, Stop):
                self.stopped = True

    def step(self) -> StepOutputs | None:
        """One step. None when there was nothing to do."""
        if not self.has_work:
            return None
        if self._preparing:
            self._add_prepared()
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

    def _add(self, request: EngineRequest) -> None:
        try:
            self.scheduler.add(request)
        except ValueError as error:
            self._fail(request.request_id, str(error))

    def _add_prepared(self) -> None:
        if not self.scheduler.has_requests and not any(p.ready for _, p in self._preparing.values()):
            time.sleep(_POLL_SECONDS)  # nothing else to do
        for request_id, (request, preparation) in list(self._preparing.items()):
            if preparation.ready:
                del self._preparing[request_id]
                if preparation.error is None:
                    self._add(request)
                else:
                    self._fail(request_id, preparation.error)

    def _next_suspect(self) -> str | None:
        while self._suspects and not self.scheduler.is_running(self._suspects[0]):
            self._suspects.popleft()  # left meanwhile
        return self._suspects[0] if self._suspects else None

    def _on_failure(self, batch: SchedulerOutput, error: Exception) -> None:
        if isinstance(error, RequestFailedError):
            self.scheduler.abort(error.request_id)
            self._fail(error.request_id, str(error))
            return
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
