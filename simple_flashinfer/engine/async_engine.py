"""The engine as an async iterator: what the HTTP layer sees of it.

Each request has an inbox of its own that the engine's messages are dealt into, once a step. Whoever stops
iterating, for whatever reason, aborts the request: a client that leaves frees its pages within one step.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager

from simple_flashinfer.engine.channel import EngineFailure, FrontEnd, Message
from simple_flashinfer.types import (
    Abort,
    Add,
    EngineDeadError,
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    FinishReason,
)

logger = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """As many requests wait as may."""


class _Inbox:
    """What has come for one request and was not taken yet. After the final output nothing more is taken in."""

    def __init__(self) -> None:
        self._output: EngineOutput | None = None
        self._filled = asyncio.Event()

    def put(self, output: EngineOutput) -> None:
        if self._output is None:
            self._output = output
            self._filled.set()
        elif self._output.finish_reason is None:
            self._output.join(output)

    async def take(self) -> EngineOutput:
        """All of it, as one; waits until there is something."""
        await self._filled.wait()
        output, self._output = self._output, None
        self._filled.clear()
        assert output is not None
        return output


class AsyncEngine:
    """Lives in one event loop. `stats` is what the engine last told."""

    def __init__(self, channel: FrontEnd, info: EngineInfo, max_requests: int) -> None:
        self.info = info
        self.stats = EngineStats(num_pages=info.num_pages, num_free_pages=info.num_pages)
        self.failure: str | None = None  # why the engine is dead
        self._channel = channel
        self._max_requests = max_requests
        self._inboxes: dict[str, _Inbox] = {}

    def start(self) -> None:
        """Call in the event loop."""
        self._channel.start(asyncio.get_running_loop(), self._on_message)

    def check_ready(self, num_requests: int = 1) -> None:
        """Raises EngineDeadError or QueueFullError when so many more requests would be refused."""
        if self.failure is not None:
            raise EngineDeadError(self.failure)
        if len(self._inboxes) + num_requests > self._max_requests:
            raise QueueFullError(f"{len(self._inboxes)} requests are running or waiting already")

    @contextmanager
    def places(self, requests: Sequence[EngineRequest]) -> Iterator[None]:
        """Takes a place for each until its answer is complete, or for none: then it raises as `check_ready` does."""
        self.check_ready(len(requests))
        taken = {request.request_id: _Inbox() for request in requests}
        self._inboxes |= taken
        try:
            yield
        finally:
            for request_id in taken:
                self._inboxes.pop(request_id, None)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """All that has come since the last time; the last output has a finish reason.

        Within `places` of the request only.
        """
        inbox = self._inboxes[request.request_id]
        self._channel.send(Add(request))
        finished = False
        try:
            while True:
                output = await inbox.take()
                reason = output.finish_reason
                finished = reason not in (None, FinishReason.ERROR)  # after fail_all the engine still works on it
                yield output
                if reason is not None:
                    return
        finally:
            del self._inboxes[request.request_id]
            if not finished:
                self._channel.send(Abort(request.request_id))

    def _on_message(self, message: Message) -> None:
        if isinstance(message, EngineFailure):
            self.failure = self.failure or message.message  # of several the first is the cause
            self.fail_all("The engine stopped working.")
            return
        self.stats = message.stats
        for output in message.outputs:
            if (inbox := self._inboxes.get(output.request_id)) is not None:  # None: its client left
                inbox.put(output)

    def fail_all(self, message: str) -> None:
        """Ends every request with an error."""
        for request_id, inbox in self._inboxes.items():
            inbox.put(EngineOutput(request_id, [], FinishReason.ERROR, message))

    async def close(self) -> None:
        await asyncio.to_thread(self._channel.close)
