"""What the runner asks of an attention backend, in FlashInfer's words.

R requests and T tokens stand in one flat batch. Request i has the query tokens qo_indptr[i] : qo_indptr[i + 1] and the
pages kv_indices[kv_indptr[i] : kv_indptr[i + 1]]; its last page holds kv_last_page_len[i] tokens, 1 to page_size, the
query tokens included: a query token at position p attends to positions 0 .. p.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from simple_flashinfer.kernels.decoder_parts import DecoderParts
from simple_flashinfer.types import Int32Array, SchedulerOutput

# hidden states [1, T, hidden], positions int64 [T] -> hidden states
RunLayers = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class UnsupportedLayerError(ValueError):
    """The model has a layer that the backend would compute wrongly; the message names the layer."""


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What one layer passes to attention, as seen in a trial forward pass of the model.

    sliding_window counts the token itself: 1 attends to nothing else. softcap bounds the scores by
    softcap * tanh(score / softcap). Sinks are one learned logit a head that joins the softmax but has no value.
    """

    layer_idx: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return self.num_kv_heads * (self.head_dim_qk + self.head_dim_vo) * dtype.itemsize


@dataclass(slots=True)
class AttentionMetadata:
    """One step's batch, host side. The first num_decodes requests have one query token each.

    num_shared_pages: pages at the front that all of these have in common, though at least the last one is each one's own.
    Shapes: qo_indptr, kv_indptr int32 [R + 1]; kv_indices int32 [pages of all]; kv_last_page_len, kv_lens int32 [R];
    batch_indices (the request of each token), positions int32 [T].
    """

    num_decodes: int
    num_shared_pages: int
    qo_indptr: Int32Array
    kv_indptr: Int32Array
    kv_indices: Int32Array
    kv_last_page_len: Int32Array
    kv_lens: Int32Array
    batch_indices: Int32Array
    positions: Int32Array

    @classmethod
    def of(cls, batch: SchedulerOutput) -> "AttentionMetadata":
        """Copies out of the live table what this step needs."""
        scheduled, table = batch.num_scheduled_tokens, batch.table
        kv_lens = batch.num_computed_tokens + scheduled
        num_pages = -(-kv_lens // table.page_size)
        qo_indptr = _indptr(scheduled)
        batch_indices = np.repeat(np.arange(len(scheduled), dtype=np.int32), scheduled)
        first = (batch.num_computed_tokens - qo_indptr[:-1])[batch_indices]
        columns = np.arange(int(num_pages.max()))
        pages = table.page_table[batch.rows, : len(columns)]
        return cls(
            num_decodes=batch.num_decodes,
            num_shared_pages=_num_shared(pages[: batch.num_decodes], num_pages[: batch.num_decodes]),
            qo_indptr=qo_indptr,
            kv_indptr=_indptr(num_pages),
            kv_indices=pages[columns < num_pages[:, None]],
            kv_last_page_len=(kv_lens - (num_pages - 1) * table.page_size).astype(np.int32),
            kv_lens=kv_lens,
            batch_indices=batch_indices,
            positions=np.arange(int(qo_indptr[-1]), dtype=np.int32) + first,
        )

    def without_shared(self, page_size: int) -> "AttentionMetadata":
        """The decodes without the pages that they have in common, as if their tokens began behind these."""
        decodes, shared = self.num_decodes, self.num_shared_pages
        requests = np.minimum(np.arange(len(self.kv_indptr), dtype=np.int32), decodes)
        own = np.ones(len(self.kv_indices), np.bool_)
        own[self.kv_indptr[:decodes, None] + np.arange(shared)] = False
        skipped = np.where(self.batch_indices < decodes, np.int32(shared * page_size), np.int32(0))
        return replace(
            self,
            num_shared_pages=0,
            kv_indptr=self.kv_indptr - shared * requests,
            kv_indices=self.kv_indices[own],
            kv_lens=self.kv_lens - shared * page_size * np.diff(requests),
            positions=self.positions - skipped,
        )

    def padded(self, size: int, scratch_page: int) -> "AttentionMetadata":
        """Decodes filled up to `size` requests, with ones of a single token in a page that nobody reads."""
        count = size - len(self.kv_lens)
        ones = np.ones(count, np.int32)

        def more(array: Int32Array, values: Int32Array) -> Int32Array:
            return np.concatenate([array, values])

        return AttentionMetadata(
            num_decodes=size,
            num_shared_pages=0,
            qo_indptr=_indptr(np.ones(size, np.int32)),
            kv_indptr=more(self.kv_indptr, self.kv_indptr[-1] + np.cumsum(ones, dtype=np.int32)),
            kv_indices=more(self.kv_indices, ones * np.int32(scratch_page)),
            kv_last_page_len=more(self.kv_last_page_len, ones),
            kv_lens=more(self.kv_lens, ones),
            batch_indices=np.arange(size, dtype=np.int32),
            positions=more(self.positions, ones - 1),
        )


def _indptr(lengths: Int32Array) -> Int32Array:
    indptr = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=indptr[1:])
    return indptr


def _num_shared(pages: Int32Array, num_pages: Int32Array) -> int:
    """pages [R, most of one], num_pages [R]"""
    if len(pages) < 2 or (pages[:, 0] != pages[0, 0]).any():
        return 0
    most = int(num_pages.min()) - 1
    same = (pages[:, :most] == pages[0, :most]).all(0)
    return most if same.all() else int(same.argmin())


class AttentionBackend(ABC):
    """Owns the K/V pages of all layers. One thread; `plan` once for each forward pass, then `run` once for each layer.

    Raises UnsupportedLayerError when it can't compute one of the layers exactly.
    """

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """kv_dtype: how K and V are kept, where that is not the dtype they are computed in."""
        for layer in layers:
            if reason := self.unsupported(layer, dtype):
                raise UnsupportedLayerError(
                    f"layer {layer.layer_idx} of the model {reason}, which the {type(self).__name__} can't compute"
                )
        self.layers = {layer.layer_idx: layer for layer in layers}
        self.num_pages = num_pages
        self.page_size = page_size
        self.dtype = dtype
        self.kv_dtype = kv_dtype or dtype
        self.device = device
        self._allocate()

    @abstractmethod
    def _allocate(self) -> None:
        """Makes the pages, all zeros, and what else lasts."""

    @classmethod
    @abstractmethod
    def unsupported(cls, layer: AttentionLayer, dtype: torch.dtype) -> str | None:
        """What of this layer the backend can't do ("uses ..."), or None."""

    @classmethod
    def workspace_bytes(cls, layers: Sequence[AttentionLayer], num_graphs: int) -> int:
        """Of the device, beside the pages, when as many batch sizes are planned by `plan_graph`."""
        return 0

    def warm_up(self) -> None:
        """Compiles and loads kernels that only some steps use: no request shall wait for that. While the pages are empty."""
        return

    def prefers_eager(self, metadata: AttentionMetadata) -> bool:
        """Whether these decodes are to be planned by `plan` although a CUDA graph could run them."""
        return False

    @abstractmethod
    def plan(self, metadata: AttentionMetadata) -> None:
        """Host-side work that all layers of one forward pass share."""

    def plan_graph(self, metadata: AttentionMetadata, size: int) -> bool:
        """Plans decodes for a CUDA graph over `size` requests: the same buffers and kernels for every plan that returns the
        same of two answers.

        What `run` then does may be captured, and replayed after any later plan_graph of that size and answer. Backends
        whose `run` can't be captured leave this as it is.
        """
        raise ValueError(f"{type(self).__name__} can't run inside a CUDA graph; leave --cuda_graph off")

    @abstractmethod
    def run(
        self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Appends k and v to the planned pages and attends.

        q [T, num_qo_heads, head_dim_qk], k [T, num_kv_heads, head_dim_qk], v [T, num_kv_heads, head_dim_vo], all in
        `dtype`; sinks [num_qo_heads]. Returns [T, num_qo_heads, head_dim_vo].
        """

    def decoder_layers(
        self, parts: Mapping[int, DecoderParts], cos: torch.Tensor, sin: torch.Tensor, exact: bool = False
    ) -> RunLayers | None:
        """Whole decoder layers that follow each other, by layer_idx, as one call, where the backend has one.

        cos, sin [positions, head_dim]. exact: to the bit what the same kernels give one after the other, for a trial.
        """
        return None

    @abstractmethod
    def gather(self, layer_idx: int, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of some pages, each [num_kv_heads, len(pages) * page_size, head_dim]: for checks, not for speed."""

    def _narrow(self, x: torch.Tensor) -> torch.Tensor:
        """As the pages keep it. Numbers beyond the largest of float8 become that one: a cast alone may make them NaN."""
        if self.kv_dtype == self.dtype:
            return x
        limit = torch.finfo(self.kv_dtype).max
        return x.clamp(-limit, limit).to(self.kv_dtype)
