"""The engine: commands in, one step at a time, outputs out. Synchronous and single-threaded.

With `overlap` the next step is scheduled and handed to the executor before the result of the one before is waited for: the
device always has something to do, and what the host does takes no time of it.

A step that fails is taken back, and with it the one that was scheduled after it, so that it can simply be tried again. When
several requests were in it, each is tried alone; the one that fails alone is to blame and gets the error, the others
never notice. Only an EngineDeadError (the device is lost) ends the engine.

A request with a grammar waits outside of the scheduler until the executor has compiled it, so that it holds up nobody.
"""

import logging
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
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
    RequestFailedError,
    SchedulerOutput,
    StepOutputs,
    StepResult,
    Stop,
)

logger = logging.getLogger(__name__)


class Executor(Protocol):
    """Runs steps on the model, in the order in which they come."""

    def execute(self, batch: SchedulerOutput) -> StepResult: ...

    def prepare(self, request: EngineRequest) -> "Preparation":
        """Begins, in the background, what a request with a grammar needs before it is scheduled."""

    def shutdown(self) -> None: ...


class Preparation(Protocol):
    error: str | None  # why it failed, once it is ready

    @property
    def ready(self) -> bool: ...


_POLL_SECONDS = 1e-3


class EngineCore:
    def __init__(
        self, scheduler: Scheduler, executor: Executor, overlap: bool = False, check_when_idle: bool = False
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.stopped = False
        self._most_in_flight = 1 if overlap else 0  # while the host does something else than to wait for them
        self._in_flight: deque[tuple[SchedulerOutput, StepResult]] = deque()  # oldest first
        self._check_when_idle = check_when_idle
        self._suspects: deque[str] = deque()  # were in a step that failed: each runs alone once
        self._preparing: dict[str, tuple[EngineRequest, Preparation]] = {}
        self._outputs: list[EngineOutput] = []  # to be told with the next step

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_requests or bool(self._outputs or self._preparing or self._in_flight)

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
                    self._outputs.append(EngineOutput(command.request_id, [], FinishReason.ABORT))
            elif isinstance(command, Stop):
                self.stopped = True

    def step(self) -> StepOutputs | None:
        """Hands over one step, and takes in what this or the one before gave. None when there was nothing to do."""
        if not self.has_work:
            return None
        if self._preparing:
            self._add_prepared()
        batch = self.scheduler.schedule(only=self._next_suspect())
        try:
            if batch is not None:
                self._in_flight.append((batch, self.executor.execute(batch)))
            if self._in_flight and (batch is None or self._suspects or len(self._in_flight) > self._most_in_flight):
                batch, running = self._in_flight[0]
                result = running.result()
                self._in_flight.popleft()
                self._outputs += self.scheduler.update(batch, result)
                if self._suspects:
                    self._suspects.popleft()
        except EngineDeadError:
            raise
        except Exception as error:
            assert batch is not None
            self._take_back()
            self._on_failure(batch, error)
        outputs, self._outputs = self._outputs, []
        if self._check_when_idle and not self.scheduler.has_requests and not self._in_flight:
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

    def _take_back(self) -> None:
        """All steps in flight. Each is waited for: what it still writes must not come after what is scheduled next."""
        while self._in_flight:
            _, running = self._in_flight.popleft()
            with suppress(Exception):  # a lost device shows again
                running.result()
        self.scheduler.rollback()

    def _on_failure(self, batch: SchedulerOutput, error: Exception) -> None:
        if isinstance(error, RequestFailedError):
            if self.scheduler.abort(error.request_id):
                self._fail(error.request_id, str(error))
            return
        request_ids = self.scheduler.ids_of(batch)
        if len(request_ids) > 1:
            logger.warning("A step of %d requests failed (%r); trying each alone.", len(request_ids), error)
            self._suspects.extend(request_ids)
        elif request_ids:
            logger.error("Request %s failed.", request_ids[0], exc_info=error)
            self.scheduler.abort(request_ids[0])
            self._fail(request_ids[0], f"The engine failed on this request: {type(error).__name__}")

    def _fail(self, request_id: str, message: str) -> None:
        self._outputs.append(EngineOutput(request_id, [], FinishReason.ERROR, message))
