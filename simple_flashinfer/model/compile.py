"""`--torch_compile`: the forward pass by torch's compiler. It is told when that happens, and what it made is kept on disk.

Attention stays one opaque operator (attention_hook.py) and numbers of tokens are dynamic, so that a model is compiled some
three times: for one token, for several, and for several of which not all are drawn from. torch gives up compiling anew after
eight times, says so, and goes on without.
"""

import functools
import logging
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.callback import CallbackArgs, callback_handler

from simple_flashinfer.kernels.compiler import cache_folder

logger = logging.getLogger(__name__)


def compile_model(model: torch.nn.Module, mode: str) -> Callable[..., Any]:
    """The model's forward; it is compiled when it is called. mode: torch.compile's."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))  # torch's own choice is below /tmp
    _tell()
    return torch.compile(model, mode=mode, dynamic=True)


@functools.cache
def _tell() -> None:
    """Logs each compilation in this process: requests wait for it."""
    begun, count = 0.0, 0

    def start(args: CallbackArgs) -> None:
        nonlocal begun, count
        begun, count = time.perf_counter(), count + 1
        logger.info("torch.compile: compilation %d begins; requests wait", count)

    def end(args: CallbackArgs) -> None:
        logger.info("torch.compile: compilation %d took %.1f s", count, time.perf_counter() - begun)

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)
