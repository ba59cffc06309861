"""The daemon: `simple-flashinfer`, or `python3 -m simple_flashinfer.main`; with `bench` as first argument the benchmark."""

import asyncio
import ipaddress
import logging
import socket
import sys
import time
from collections.abc import Sequence

from simple_flashinfer.config import DEMO_MODEL, Config, ConfigError, load_config
from simple_flashinfer.log import set_up_logging

logger = logging.getLogger(__name__)

_GRACE_SECONDS = 3  # for answers under way, when the daemon is told to stop
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
        run(config)
    except ConfigError as error:
        print(f"simple-flashinfer: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run(config: Config) -> None:
    """Serves until it is told to stop. Raises ConfigError, in a sentence, when it can't start."""
    listener = _listen(config.host, config.port)  # first: a port that is taken is told before gigabytes are loaded
    from simple_flashinfer.engine.launch import resolve_model, start_engine

    path = resolve_model(config)
    wait_for_engine = start_engine(config, path)  # a process of its own gets on while this one imports what it needs
    import uvicorn

    from simple_flashinfer.engine.async_engine import AsyncEngine
    from simple_flashinfer.engine.requests import RequestFactory
    from simple_flashinfer.server.app import create_app
    from simple_flashinfer.server.service import Service
    from simple_flashinfer.text.tokenizer import Tokenizer

    start = time.perf_counter()
    tokenizer = Tokenizer(path, config.tool_call_parser, config.reasoning_parser)
    logger.info("Tokenizer ready in %.1f s, most of it the import of transformers", time.perf_counter() - start)
    channel, info = wait_for_engine()
    service = Service(
        config=config,
        engine=AsyncEngine(channel, info, max_requests=config.max_sequence + config.max_waiting),
        tokenizer=tokenizer,
        requests=RequestFactory(info, config.seed, tokenizer.eos_token_id),
    )

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """New connections are refused at once; answers under way get some time, and then an error as their end."""
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
    _announce(config, listener)
    server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        raise ConfigError(f"can't listen on --host {host} --port {port}: {error.strerror or error}") from error
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
