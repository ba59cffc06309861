"""Between a front end's event loop and the engine loop: commands one way, one message a step the other way.

Two implementations that AsyncEngine can't tell apart. ThreadChannel costs one call_soon_threadsafe a step. ProcessChannel
gives the engine an interpreter lock and a crash domain of its own over a duplex pipe of the standard library: an engine has
few front ends, all on the same machine, so a message library would add a dependency and nothing else. Both sides
of the pipe read in a thread or loop that does nothing else, so neither a large prompt nor a slow step blocks the other.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Protocol

from simple_flashinfer.types import Abort, Add, Command, EngineOutput, StepOutputs, Stop

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
        self._outbox = _Outbox()
        self.start = self._outbox.start
        self._closing = False
        self._writer, reader = (
            threading.Thread(target=target, name=f"engine-{target.__name__.strip('_')}", daemon=True)
            for target in (self._write, self._read)
        )
        self._writer.start()
        reader.start()

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

    def _read(self) -> None:
        try:
            while True:
                self._outbox.post(self._connection.recv())
        except (EOFError, OSError):
            if not self._closing:
                self._outbox.post(EngineFailure("the engine process ended unexpectedly"))


class ProcessEngineEnd:
    """The engine's side of the pipes, one to each front end; their request ids differ.

    The requests of a front end that stops, or is gone, are aborted. When none is left the engine is told to stop.
    """

    def __init__(self, connections: Sequence[Connection]) -> None:
        self._connections = list(connections)
        self._of_request: dict[str, Connection] = {}

    def recv(self, block: bool) -> list[Command]:
        commands: list[Command] = []
        while self._connections:
            ready = wait(self._connections, None if block and not commands else 0)
            if not ready:
                return commands
            for connection in ready:
                commands += self._read(connection)  # type: ignore[arg-type]
        return [*commands, Stop()]

    def _read(self, connection: Connection) -> list[Command]:
        try:
            commands: list[Command] = connection.recv()
        except (EOFError, OSError):
            logger.warning("A process that served HTTP is gone; its requests end.")
            commands = [Stop()]
        for command in commands:
            if isinstance(command, Add):
                self._of_request[command.request.request_id] = connection
        if commands and isinstance(commands[-1], Stop):
            self._connections.remove(connection)
            left = [request_id for request_id, theirs in self._of_request.items() if theirs is connection]
            return [*commands[:-1], *map(Abort, left)]
        return commands

    def send(self, message: Message) -> None:
        if isinstance(message, EngineFailure):
            messages: dict[Connection, Message] = dict.fromkeys(self._connections, message)
        else:
            outputs: dict[Connection, list[EngineOutput]] = {connection: [] for connection in self._connections}
            for output in message.outputs:
                connection = self._of_request[output.request_id]
                if output.finish_reason is not None:
                    del self._of_request[output.request_id]
                outputs.setdefault(connection, []).append(output)
            messages = {connection: StepOutputs(theirs, message.stats) for connection, theirs in outputs.items()}
        for connection, theirs in messages.items():
            with contextlib.suppress(OSError):  # it is gone, which `recv` will see
                connection.send(theirs)
