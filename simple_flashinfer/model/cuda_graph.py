"""Decode steps as CUDA graphs: one launch instead of some hundreds.

A graph is a recording for one batch size, so sizes are few (1, 2, 4, then multiples of 8) and a batch is filled up to the
next one: the padding rows compute a token nobody reads and write into a page of their own. A graph is captured when its size
first comes up. What changes from step to step (tokens, positions, page table) stands in buffers that the graph reads;
the attention backend's own are filled by `plan_graph`, which runs on the host before each replay.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from simple_flashinfer.attention import AttentionBackend, AttentionMetadata
from simple_flashinfer.types import Int32Array

logger = logging.getLogger(__name__)

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Replay = Callable[[], torch.Tensor]


class CudaCapture:
    """Records a function as a graph. All graphs share one memory pool: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], torch.Tensor]) -> Replay:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()  # outside of the recording first: kernels are compiled and workspaces taken at first use
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = function()
        self._pool = graph.pool()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


class DecodeGraphs:
    """`forward` maps token ids, positions and rows to keep, int64 [B] each, to logits [B, V]."""

    def __init__(
        self,
        backend: AttentionBackend,
        forward: Forward,
        max_num_seqs: int,
        device: torch.device,
        capture: Callable[[Callable[[], torch.Tensor]], Replay] | None = None,
    ) -> None:
        self._backend = backend
        self._forward = forward
        self._capture = capture or CudaCapture()
        self._replays: dict[int, Replay] = {}
        largest = self.size_of(max_num_seqs)
        self._ids = torch.zeros(largest, dtype=torch.int64, device=device)
        self._positions = torch.zeros(largest, dtype=torch.int64, device=device)
        self._rows = torch.arange(largest, device=device)

    @staticmethod
    def size_of(num_requests: int) -> int:
        """The batch size whose graph serves so many requests."""
        return next((size for size in (1, 2, 4) if num_requests <= size), -(-num_requests // 8) * 8)

    def run(self, metadata: AttentionMetadata, token_ids: Int32Array) -> torch.Tensor:
        """One token of each of R requests, int32 [R] -> logits [R, V]; valid until the next run."""
        count = len(token_ids)
        size = self.size_of(count)
        self._backend.plan_graph(metadata, size)
        # padding rows keep whatever token and position an earlier batch left there
        self._ids[:count].copy_(torch.from_numpy(token_ids))
        self._positions[:count].copy_(torch.from_numpy(metadata.positions))
        if size not in self._replays:
            logger.debug("Capturing a CUDA graph for %d requests.", size)
            ids, positions, rows = self._ids[:size], self._positions[:size], self._rows[:size]
            self._replays[size] = self._capture(lambda: self._forward(ids, positions, rows))
        return self._replays[size]()[:count]
