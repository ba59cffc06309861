"""The paced engine loop: the same function in a thread and in a process of its own."""

import logging
import time

from simple_flashinfer.core.engine import EngineCore
from simple_flashinfer.engine.channel import EngineEnd, EngineFailure

logger = logging.getLogger(__name__)


def run_engine_loop(core: EngineCore, channel: EngineEnd, microsleep: float) -> None:
    """Steps while there is work and blocks while there is none: an idle daemon costs no CPU.

    The microsleep opens a short window when the first request wakes an idle engine, so that requests that were sent
    together start in one batch. A busy engine never sleeps: what arrives during a step joins the next.
    """
    while not core.stopped:
        idle = not core.has_work
        commands = channel.recv(block=idle)
        if idle and microsleep:
            time.sleep(microsleep)
            commands += channel.recv(block=False)
        core.apply(commands)
        if outputs := core.step():
            channel.send(outputs)


def serve(core: EngineCore, channel: EngineEnd, microsleep: float) -> None:
    """run_engine_loop to its end. A failure that ends it is told to the other side: the loop never dies silently."""
    try:
        run_engine_loop(core, channel, microsleep)
    except BaseException as error:
        logger.critical("The engine stopped working.", exc_info=error)
        channel.send(EngineFailure(f"{type(error).__name__}: {error}"))
    finally:
        core.executor.shutdown()
