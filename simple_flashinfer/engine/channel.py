"""Between the front end's event loop and the engine loop: commands one way, one message a step the other way.

Two implementations that AsyncEngine can't tell apart. ThreadChannel costs one call_soon_threadsafe a step. ProcessChannel
gives the engine an interpreter lock and a crash domain of its own over a duplex pipe of the standard library: an engine has
one front end on the same machine, so a message library would add a dependency and nothing else. Both sides
of the pipe read in a thread or loop that does nothing else, so neither a large prompt nor a slow step blocks the other.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

from simple_flashinfer.types import Command, StepOutputs, Stop


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
        """Ends the engine, and waits for it."""


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
    """The front end's side of the pipe; `wait_for_exit` joins the process."""

    def __init__(self, connection: Connection, wait_for_exit: Callable[[], None]) -> None:
        self._connection = connection
        self._wait_for_exit = wait_for_exit
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._outbox = _Outbox()
        self.start = self._outbox.start
        self._closing = False
        for target in (self._write, self._read):
            threading.Thread(target=target, name=f"engine-{target.__name__.strip('_')}", daemon=True).start()

    def send(self, command: Command) -> None:
        self._inbox.put(command)

    def close(self) -> None:
        self._closing = True
        self._inbox.put(Stop())
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
    """The engine's side of the pipe. A front end that is gone reads as Stop."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def recv(self, block: bool) -> list[Command]:
        commands: list[Command] = []
        try:
            while (block and not commands) or self._connection.poll(0):
                commands += self._connection.recv()
        except (EOFError, OSError):
            commands.append(Stop())
        return commands

    def send(self, message: Message) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(message)
