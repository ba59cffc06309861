"""The daemon: `simple-flashinfer`, or `python3 -m simple_flashinfer.main`; with `bench` as first argument the benchmark."""

import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from simple_flashinfer.config import DEMO_MODEL, Config, ConfigError, load_config
from simple_flashinfer.log import set_up_logging

logger = logging.getLogger(__name__)

_BACKLOG = 2048


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["bench"]:
            from simple_flashinfer.bench.command import bench

            bench(argv[1:])
            return 0
        config = load_config(argv)
        set_up_logging(config.loglevel)
        # the server raises it once more when all answers are given: what is left must be cleaned up as after Ctrl-C
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        run(config)
    except ConfigError as error:
        print(f"simple-flashinfer: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run(config: Config) -> None:
    """Serves until it is told to stop. Raises ConfigError, in a sentence, when it can't start."""
    count = _num_front_ends(config)
    listeners = _listen(config.host, config.port, count)  # first: a port that is taken is told before gigabytes are loaded
    from simple_flashinfer.engine.launch import resolve_model, start_engine

    path = resolve_model(config)
    # a process of its own gets on while this one imports what it needs
    connect, pipes = start_engine(config, path, num_others=count - 1)
    from simple_flashinfer.server.front_end import FrontEnds, serve_http

    with FrontEnds(config, path, pipes, listeners[1:]) as others:
        announce = partial(_announce, config, listeners[0])
        serve_http(config, path, connect, listeners[0], others.place, on_ready=announce, on_stop=others.stop)


def _num_front_ends(config: Config) -> int:
    """One event loop streams 30,000 tokens a second, or more in larger pieces: enough for a CPU, not for a GPU."""
    if config.api_processes is None:
        gpu = config.device != "cpu" and Path("/proc/driver/nvidia").exists()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        return max(1, min(4, cores // 4)) if gpu and config.engine_process else 1
    if config.api_processes > 1 and not config.engine_process:
        raise ConfigError(f"--api_processes {config.api_processes} needs --engine_process true")
    return config.api_processes


def _listen(host: str, port: int, count: int) -> list[socket.socket]:
    """One socket for each process that serves HTTP; among several of them the system shares connections out."""
    try:
        listeners = [_bind(host, port)]
        if count > 1:  # the first only found out that nobody else listens there: with SO_REUSEPORT that would go unseen
            port = listeners.pop().getsockname()[1]
            listeners = [_bind(host, port, shared=True) for _ in range(count)]
        listeners[0].listen(_BACKLOG)
    except OSError as error:
        raise ConfigError(f"can't listen on --host {host} --port {port}: {error.strerror or error}") from error
    return listeners


def _bind(host: str, port: int, shared: bool = False) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(address)
    return listener


def _announce(config: Config, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    if not ipaddress.ip_address(host).is_loopback and not config.api_key:
        logger.warning("Anyone who reaches this machine can use the model: set --api_key, or --host 127.0.0.1")
    if config.model == DEMO_MODEL:
        logger.info("Serving the tiny demo model that comes along; a real one: --model HUB_ID_OR_FOLDER")
    shown = "localhost" if ipaddress.ip_address(host).is_unspecified else f"[{host}]" if ":" in host else host
    logger.info("Listening on http://%s:%d (interactive documentation: /docs)", shown, port)


if __name__ == "__main__":
    sys.exit(main())
