"""Decode steps as CUDA graphs: one launch instead of some hundreds.

A graph is a recording for one batch size, so sizes are few (1, 2, 4, then multiples of 8) and a batch is filled up to the
next one: the padding rows compute a token nobody reads and write into a page of their own. A graph is captured when its size
first comes up, one for each way of attention that the backend has. What changes from step to step (tokens, positions, rows,
page table) stands in buffers that the graph reads; the attention backend's own are filled by `plan_graph`, which runs on the
host before each replay. Tokens that the step before drew, and that the host does not know yet, are taken from where it left
them, inside the graph.
"""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from simple_flashinfer.attention import AttentionBackend, AttentionMetadata
from simple_flashinfer.kernels.transfer import indices
from simple_flashinfer.types import Int32Array

logger = logging.getLogger(__name__)

Outputs = tuple[torch.Tensor, torch.Tensor]
Decode = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Outputs]
Replay = Callable[[], Outputs]


class CudaCapture:
    """Records a function as a graph. All graphs share one memory pool: only one of them runs at a time.

    A function that waits for the device (experts chosen on the host, say) can't be recorded, and an attempt would end the
    engine; it is called at each replay instead.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None  # for all: cuBLAS keeps a workspace for each stream that it ever worked on
        self._waits = False

    def __call__(self, function: Callable[[], Outputs]) -> Replay:
        if self._waits:
            return function
        stream = self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # outside of the recording first: kernels are compiled and workspaces taken at first use
            self._waits = _waits(function)
        torch.cuda.current_stream().wait_stream(stream)
        if self._waits:
            logger.warning("Decode steps are not recorded as CUDA graphs, which is slower: the model waits for the device.")
            return function
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            output = function()
        self._pool = graph.pool()

        def replay() -> Outputs:
            graph.replay()
            return output

        return replay


def _waits(function: Callable[[], Outputs]) -> bool:
    """Whether it copies to the host or asks whether the device is done."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: that it may not notice all
        torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


class DecodeGraphs:
    """`decode` maps token ids, positions and rows, int64 [B] each, to logits [B, V] and tokens [B]."""

    def __init__(
        self,
        backend: AttentionBackend,
        decode: Decode,
        max_num_seqs: int,
        device: torch.device,
        capture: Callable[[Callable[[], Outputs]], Replay] | None = None,
    ) -> None:
        self._backend = backend
        self._decode = decode
        self._capture = capture or CudaCapture()
        self._replays: dict[tuple[int, bool], Replay] = {}
        # token id, position and row; padding rows are at max_num_seqs, where no request is
        self._padding = np.array([0, 0, max_num_seqs])
        self._inputs = torch.zeros(3 * self.size_of(max_num_seqs), dtype=torch.int64, device=device)

    @staticmethod
    def size_of(num_requests: int) -> int:
        """The batch size whose graph serves so many requests."""
        return next((size for size in (1, 2, 4) if num_requests <= size), -(-num_requests // 8) * 8)

    def run(self, metadata: AttentionMetadata, token_ids: Int32Array, rows: Int32Array) -> Outputs:
        """One token each: token_ids, rows int32 [R] -> logits [R, V] and tokens [R], which are valid until the next run."""
        count = len(token_ids)
        size = self.size_of(count)
        which = size, self._backend.plan_graph(metadata, size)
        inputs = np.repeat(self._padding, size)  # all ids, all positions, all rows: each without gaps
        buffer = self._inputs[: len(inputs)]
        if which not in self._replays:
            logger.debug("Capturing a CUDA graph for %d requests.", size)
            # only padding meanwhile: capturing runs the step, and must not leave tokens behind as drawn
            buffer.copy_(indices(inputs, buffer.device))
            ids, positions, of_rows = buffer.chunk(3)
            self._replays[which] = self._capture(lambda: self._decode(ids, positions, of_rows))
        inputs.reshape(3, size)[:, :count] = token_ids, metadata.positions, rows
        buffer.copy_(indices(inputs, buffer.device))
        logits, tokens = self._replays[which]()
        return logits[:count], tokens[:count]
