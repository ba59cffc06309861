"""Between a front end's event loop and the engine loop: commands one way, one message a step the other way.

Two implementations that AsyncEngine can't tell apart. ThreadChannel costs one call_soon_threadsafe a step. ProcessChannel
gives the engine an interpreter lock and a crash domain of its own over a duplex pipe of the standard library: an engine has
few front ends, all on the same machine, so a message library would add a dependency and nothing else. Neither side
waits for the other: a front end writes in a thread, and what it has no room for stays with the engine until it reads on.
"""

import asyncio
import contextlib
import logging
import os
import queue
import select
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

from simple_flashinfer.types import Abort, Add, Command, EngineOutput, EngineStats, StepOutputs, Stop

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineFailure:
    """The engine loop's last message, when it ends by an error."""

    message: str


EXIT_SECONDS = 10  # for an engine that is told to stop
Message = StepOutputs | EngineFailure


class EngineEnd(Protocol):
    def recv(self, block: bool) -> list[Command]:
        """All commands that have come; with `block`, at least one."""

    def send(self, message: Message) -> None: ...


class FrontEnd(Protocol):
    def start(self, loop: asyncio.AbstractEventLoop, on_message: Callable[[Message], None]) -> None:
        """From now on every message is handed to on_message in the event loop's thread."""

    def send(self, command: Command) -> None:
        """Never blocks."""

    def close(self) -> None:
        """Leaves. The last front end ends the engine, and the one that can waits for it."""


def _drain(inbox: "queue.SimpleQueue[Command]", block: bool) -> list[Command]:
    commands = [inbox.get()] if block else []
    with contextlib.suppress(queue.Empty):
        while True:
            commands.append(inbox.get_nowait())
    return commands


class _Outbox:
    """Hands messages to the event loop; those that come before `start` wait for it."""

    def __init__(self) -> None:
        self._started = threading.Event()

    def start(self, loop: asyncio.AbstractEventLoop, on_message: Callable[[Message], None]) -> None:
        self._loop, self._on_message = loop, on_message
        self._started.set()

    def post(self, message: Message) -> None:
        self._started.wait()
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._on_message, message)


class ThreadChannel:
    """Both ends. `run` is what the engine thread executes."""

    def __init__(self, run: Callable[[EngineEnd], None]) -> None:
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._outbox = _Outbox()
        self.start = self._outbox.start
        self._thread = threading.Thread(target=run, args=(_ThreadEngineEnd(self._inbox, self._outbox),), name="engine")
        self._thread.daemon = True
        self._thread.start()

    def send(self, command: Command) -> None:
        self._inbox.put(command)

    def close(self) -> None:
        self._inbox.put(Stop())
        self._thread.join(EXIT_SECONDS)  # not longer: it may be in a long step, and ends with the process


class _ThreadEngineEnd:
    def __init__(self, inbox: "queue.SimpleQueue[Command]", outbox: _Outbox) -> None:
        self._inbox = inbox
        self.send = outbox.post

    def recv(self, block: bool) -> list[Command]:
        return _drain(self._inbox, block)


class ProcessChannel:
    """A front end's side of its pipe; `wait_for_exit` joins the engine's process."""

    def __init__(self, connection: Connection, wait_for_exit: Callable[[], None] | None = None) -> None:
        self._connection = connection
        self._wait_for_exit = wait_for_exit
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._closing = False
        self._readable = _poll(connection, select.POLLIN)
        self._writer = threading.Thread(target=self._write, name="engine-write", daemon=True)
        self._writer.start()

    def start(self, loop: asyncio.AbstractEventLoop, on_message: Callable[[Message], None]) -> None:
        # in the event loop itself: a thread that reads would wait for the interpreter lock when the loop is busy
        loop.add_reader(self._connection.fileno(), self._read, loop, on_message)
        # uvloop makes what it watches non-blocking: of a large message reader and writer would get a part, and an error
        os.set_blocking(self._connection.fileno(), True)

    def send(self, command: Command) -> None:
        self._inbox.put(command)

    def close(self) -> None:
        self._closing = True
        self._inbox.put(Stop())
        self._writer.join(EXIT_SECONDS)
        if self._wait_for_exit is not None:
            self._wait_for_exit()

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the engine is gone: _read tells
            while True:
                commands = _drain(self._inbox, block=True)
                self._connection.send(commands)
                if any(isinstance(command, Stop) for command in commands):
                    return

    def _read(self, loop: asyncio.AbstractEventLoop, on_message: Callable[[Message], None]) -> None:
        try:
            while self._readable.poll(0):
                on_message(self._connection.recv())
        except (EOFError, OSError):
            loop.remove_reader(self._connection.fileno())
            if not self._closing:
                on_message(EngineFailure("the engine process ended unexpectedly"))


def _poll(connection: Connection, events: int) -> "select.poll":
    poll = select.poll()
    poll.register(connection, events)
    return poll


class ProcessEngineEnd:
    """The engine's side of the pipes, one to each front end; their request ids differ.

    The requests of a front end that stops, or is gone, are aborted. When none is left the engine is told to stop.
    """

    def __init__(self, connections: Sequence[Connection]) -> None:
        self._pipes = {connection.fileno(): _Pipe(connection) for connection in connections}
        self._of_request: dict[str, _Pipe] = {}
        self._poll = select.poll()
        for number in self._pipes:
            self._poll.register(number, select.POLLIN)

    def recv(self, block: bool) -> list[Command]:
        commands: list[Command] = []
        while self._pipes:
            ready = self._poll.poll(None if block and not commands else 0)
            if not ready:
                return commands
            for number, events in ready:
                if events & select.POLLOUT and self._pipes[number].flush():
                    self._poll.modify(number, select.POLLIN)
                if events & ~select.POLLOUT:
                    commands += self._read(number)
        return [*commands, Stop()]

    def _read(self, number: int) -> list[Command]:
        pipe = self._pipes[number]
        try:
            commands: list[Command] = pipe.connection.recv()
        except (EOFError, OSError):
            logger.warning("A process that served HTTP is gone; its requests end.")
            commands = [Stop()]
        for command in commands:
            if isinstance(command, Add):
                self._of_request[command.request.request_id] = pipe
        if commands and isinstance(commands[-1], Stop):
            self._poll.unregister(number)
            del self._pipes[number]
            left = [request_id for request_id, theirs in self._of_request.items() if theirs is pipe]
            return [*commands[:-1], *map(Abort, left)]
        return commands

    def send(self, message: Message) -> None:
        if isinstance(message, EngineFailure):
            for pipe in self._pipes.values():
                pipe.send_last(message)
            return
        outputs: dict[_Pipe, list[EngineOutput]] = {pipe: [] for pipe in self._pipes.values()}
        for output in message.outputs:
            pipe = self._of_request[output.request_id]
            if output.finish_reason is not None:
                del self._of_request[output.request_id]
            if pipe in outputs:  # or it is gone
                outputs[pipe].append(output)
        for number, pipe in self._pipes.items():
            if not pipe.send(StepOutputs(outputs[pipe], message.stats)):
                self._poll.modify(number, select.POLLIN | select.POLLOUT)


_MOST_KEPT_TOGETHER = 4096  # tokens in a message of kept outputs: it must fit into a pipe that takes more
_LOGPROBS_WEIGHT = 64  # of one token, in tokens: 20 likeliest ones take some 300 bytes


class _Pipe:
    """To one front end. While it takes no more, because nobody reads it, outputs are kept here: the others must not wait.

    Only what doesn't fit into an empty pipe at once, as logprobs of a long prompt may not, still waits for its reader.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._writable = _poll(connection, select.POLLOUT)  # for a socket of the system: it is empty by three quarters
        self._kept: deque[EngineOutput] = deque()
        self._last: dict[str, EngineOutput] = {}  # of those kept, by request
        self._stats = EngineStats()

    def send(self, message: StepOutputs) -> bool:
        """Whether nothing is kept."""
        self._stats = message.stats
        if self._kept or not self._writable.poll(0):
            for output in message.outputs:
                self._keep(output)
        else:
            self._write(message)
        return not self._kept

    def _keep(self, output: EngineOutput) -> None:
        last = self._last.get(output.request_id)
        if last is not None and _weight(last) < _MOST_KEPT_TOGETHER:
            last.join(output)
        else:
            self._kept.append(output)
            self._last[output.request_id] = output

    def flush(self) -> bool:
        """Sends what is kept as far as it can; whether that was all."""
        while self._kept and self._writable.poll(0):
            outputs, weight = list[EngineOutput](), 0
            while self._kept and weight < _MOST_KEPT_TOGETHER:
                outputs.append(self._kept.popleft())
                weight += _weight(outputs[-1])
            for output in outputs:
                if self._last[output.request_id] is output:
                    del self._last[output.request_id]
            self._write(StepOutputs(outputs, self._stats))
        return not self._kept

    def send_last(self, failure: EngineFailure) -> None:
        """To a front end that does not read, the end of the pipe must say it."""
        if self.flush() and self._writable.poll(0):
            self._write(failure)

    def _write(self, message: Message) -> None:
        with contextlib.suppress(OSError):  # it is gone, which `recv` will see
            self.connection.send(message)


def _weight(output: EngineOutput) -> int:
    return len(output.token_ids) + _LOGPROBS_WEIGHT * len(output.logprobs)
