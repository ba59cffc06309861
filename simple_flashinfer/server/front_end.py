"""One front end: an event loop that serves HTTP in front of an engine. `--api_processes` puts several at one engine.

Each has a listening socket, a tokenizer, a pipe to the engine and a share of the queue; the system deals connections out
among the sockets. All that they have in common is the store of responses, which is then a file.
"""

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Self

import uvicorn

from simple_flashinfer.config import Config, ConfigError
from simple_flashinfer.engine.async_engine import AsyncEngine
from simple_flashinfer.engine.launch import Connect, connect_engine
from simple_flashinfer.engine.requests import RequestFactory
from simple_flashinfer.log import set_up_logging
from simple_flashinfer.server.app import create_app
from simple_flashinfer.server.response_store import ResponseStore
from simple_flashinfer.server.service import Service
from simple_flashinfer.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 3  # for answers under way, when the daemon is told to stop


@dataclass(frozen=True, slots=True)
class Place:
    """Of a front end among `count` of them. store: where responses are kept."""

    number: int = 0
    count: int = 1
    store: str = ":memory:"


def serve_http(
    config: Config,
    path: str,
    connect: Connect,
    listener: socket.socket,
    place: Place,
    on_ready: Callable[[], None] = lambda: None,
    on_stop: Callable[[], None] = lambda: None,
) -> None:
    """Until it is told to stop. Raises ConfigError when the engine can't start."""
    start = time.perf_counter()
    tokenizer = Tokenizer(path, config.tool_call_parser, config.reasoning_parser)
    if not place.number:
        logger.info("Tokenizer ready in %.1f s, most of it the import of transformers", time.perf_counter() - start)
    channel, info = connect()
    max_requests = -(-(config.max_sequence + config.max_waiting) // place.count)
    name = f"{place.number}-" if place.number else ""
    service = Service(
        config=config,
        engine=AsyncEngine(channel, info, max_requests),
        tokenizer=tokenizer,
        requests=RequestFactory(info, config.seed, tokenizer.eos_token_id, name),
        responses=ResponseStore(place.store),
    )

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """New connections are refused at once; answers under way get some time, and then an error as their end."""
            on_stop()
            loop = asyncio.get_running_loop()
            loop.call_later(_GRACE_SECONDS, service.engine.fail_all, "The server is shutting down.")
            await super().shutdown(sockets)

    server = Server(
        uvicorn.Config(
            create_app(service),
            log_config=None,
            log_level=config.loglevel if config.loglevel == "debug" else "warning",
            access_log=config.loglevel == "debug",
            timeout_graceful_shutdown=2 * _GRACE_SECONDS,
        )
    )
    on_ready()
    gc.freeze()  # or each full collection walks through all that was imported, and every client waits for 0.3 s
    server.run(sockets=[listener])


class FrontEnds:
    """Those in processes of their own, one for each pipe, beside the one of this process. Leaving the context ends them."""

    def __init__(self, config: Config, path: str, pipes: Sequence[Connection], listeners: Sequence[socket.socket]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="simple-flashinfer-") if pipes else None
        store = f"{self._folder.name}/responses.db" if self._folder else ":memory:"
        self.place, *places = (Place(number, 1 + len(pipes), store) for number in range(1 + len(pipes)))
        context = multiprocessing.get_context("spawn")
        self._processes = []
        for place, pipe, listener in zip(places, pipes, listeners, strict=True):
            process = context.Process(target=_front_end_process, args=(config, path, pipe, listener, place), daemon=True)
            process.start()
            self._processes.append(process)
            pipe.close()
            listener.close()

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for process in self._processes:
            process.join(3 * _GRACE_SECONDS)
        if self._folder:
            self._folder.cleanup()


def _front_end_process(config: Config, path: str, pipe: Connection, listener: socket.socket, place: Place) -> None:
    set_up_logging(config.loglevel)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    with contextlib.suppress(ConfigError, EOFError, KeyboardInterrupt):  # the first process tells
        serve_http(config, path, partial(connect_engine, pipe), listener, place)
