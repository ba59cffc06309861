"""Paged attention by FlashInfer's kernels, on CUDA.

A layer's cache is one [num_pages, 2, page_size, num_kv_heads, head_dim] tensor (NHD layout): K and V have equal strides,
for which FlashInfer needs no second compiled module. Layers that differ in scale, window, cap or shape are planned
apart: each kind of layer has one wrapper for decode and one for prefill, over one shared workspace (they run one
after the other on one stream).

For CUDA graphs each batch size has decode wrappers of its own over buffers that stay where they are; one page beyond the
pool takes what the padding rows write.

Requests with one query token take the decode wrapper, all others the prefill wrapper, which does chunks over a cached
prefix as well. Decodes that all begin with the same pages (prefix caching lets requests share them) may be computed in two
levels, a cascade: all queries together against the shared pages, which are read once, each against its own pages, and the
two merged. Models with windows have none: in a window each request sees other parts of what is shared.

Index arrays that `plan` reads on the host are given as CPU tensors, so that planning never waits for the device; they lie in
pinned memory, so that copying them doesn't either. FlashInfer keeps one pinned buffer a wrapper for what planning finds out:
the next plan waits until the device has copied it.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from simple_flashinfer.attention.base import AttentionBackend, AttentionLayer, AttentionMetadata, RunLayers
from simple_flashinfer.kernels.cuda import CudaDecoderLayer, CudaDecoderLayers, cuda_kernels
from simple_flashinfer.kernels.decoder_parts import DecoderParts
from simple_flashinfer.kernels.flashinfer import library
from simple_flashinfer.types import Int32Array

logger = logging.getLogger(__name__)

_WORKSPACE_BYTES = 256 << 20
_WRAPPER_BYTES = (8 << 20) + (128 << 10)  # each has buffers of its own for what planning finds out
_HEAD_DIMS = (64, 128, 256)
_MAX_PADDING_ROWS = 64  # in one decode graph
_MIN_GRAPH_INDICES = 1 << 20  # pages of all requests of a graph: more than there are, since requests share them
_TENSOR_CORE_GROUP = 4  # query heads per K/V head from which decode is faster on tensor cores
# Bytes of K/V in one layer that a cascade does not read again. An H100 reads 3.35 TB/s: 64 MiB are 20 us, the time that the
# second level, its copies and the merge may take. Reckoned, not measured on a card.
_CASCADE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class _Kind:
    """Layers that one plan serves."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    window_left: int  # FlashInfer does not count the token itself; -1 is no window
    softcap: float

    @classmethod
    def of(cls, layer: AttentionLayer) -> "_Kind":
        window_left = -1 if layer.sliding_window is None else layer.sliding_window - 1
        return cls(
            layer.num_qo_heads, layer.num_kv_heads, layer.head_dim_qk, layer.scaling, window_left, layer.softcap or 0.0
        )

    @property
    def use_tensor_cores(self) -> bool:
        return self.num_qo_heads // self.num_kv_heads >= _TENSOR_CORE_GROUP


class _Cascade:
    """Decodes in two levels, run as one of them is.

    The level that all share is one request: the heads of all queries that read a K/V head stand side by side, as that head's
    group. So each level is a decode, which graphs may hold, and which spreads few K/V heads over all of the GPU. The
    library's MultiLevelCascadeAttentionWrapper takes FlashAttention 3 on Hopper, which packs no groups and splits no keys.
    """

    def __init__(self, kind: _Kind, shared: Any, own: Any, merge_state_in_place: Any) -> None:
        self._kind = kind
        self._shared = shared
        self._own = own
        self._merge = merge_state_in_place

    def run(self, q: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """q [R, num_qo_heads, head_dim] -> the same"""
        count, kv_heads, dim = len(q), self._kind.num_kv_heads, self._kind.head_dim
        out, lse = self._own.run(q, cache, return_lse=True)
        together = q.view(count, kv_heads, -1, dim).transpose(0, 1).reshape(1, -1, dim)
        other, other_lse = self._shared.run(together, cache, return_lse=True)
        other = other.view(kv_heads, count, -1, dim).transpose(0, 1).reshape(q.shape).contiguous()
        other_lse = other_lse.view(kv_heads, count, -1).transpose(0, 1).reshape(lse.shape).contiguous()
        self._merge(out, lse, other, other_lse)
        return out  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _GraphPlan:
    """What a captured decode over one batch size reads: int32 on the device, filled anew by each plan.

    shared: wrappers of a cascade's level that all share, made when they are first used.
    """

    wrappers: dict[_Kind, Any]
    shared: dict[_Kind, Any]
    batch_indices: torch.Tensor  # [size]
    positions: torch.Tensor  # [size]
    kv_indptr: torch.Tensor  # [size + 1]
    kv_last_page_len: torch.Tensor  # [size]


def _can_cascade(kinds: Iterable[_Kind]) -> bool:
    return all(kind.window_left < 0 for kind in kinds)


class FlashInferBackend(AttentionBackend):
    """cascade: whether decodes may be computed in two levels."""

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
        cascade: bool = True,
    ) -> None:
        self._cascade_is_on = cascade
        super().__init__(
            layers, num_pages=num_pages, page_size=page_size, dtype=dtype, device=device, kv_dtype=kv_dtype
        )  # fmt: skip

    def _allocate(self) -> None:
        self._flashinfer = library()
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        self._kinds = {index: _Kind.of(layer) for index, layer in self.layers.items()}
        self._prefill: dict[_Kind, Any] = {}
        self._decode: dict[_Kind, Any] = {}
        self._shared: dict[_Kind, Any] = {}
        for kind in dict.fromkeys(self._kinds.values()):
            self._prefill[kind] = self._flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
            self._decode[kind] = self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                "NHD",
                use_tensor_cores=kind.use_tensor_cores,
            )
        if self._cascade_is_on and _can_cascade(self._decode):
            self._shared = {kind: self._shared_wrapper() for kind in self._decode}
            self._shared_indices = torch.zeros(self.num_pages, dtype=torch.int32, device=self.device)  # of all graphs
        self._graphs: dict[int, _GraphPlan] = {}
        # the rest is for padding rows, which repeat the scratch page
        indices = max(self.num_pages, _MIN_GRAPH_INDICES) + _MAX_PADDING_ROWS
        self._graph_indices = torch.zeros(indices, dtype=torch.int32, device=self.device)
        self._copied: Any = torch.cuda.Event() if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]

        def pages(layer: AttentionLayer) -> torch.Tensor:
            shape = (self.num_pages + 1, 2, self.page_size, layer.num_kv_heads, layer.head_dim_qk)
            return torch.zeros(shape, dtype=self.kv_dtype, device=self.device)

        self._caches = {index: pages(layer) for index, layer in self.layers.items()}
        # of K and V in one layer, where that is most
        self._page_bytes = self.page_size * max(layer.bytes_per_token(self.kv_dtype) for layer in self.layers.values())

    def _shared_wrapper(self, **buffers: Any) -> Any:
        return self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "NHD", use_tensor_cores=True, **buffers
        )  # fmt: skip

    @classmethod
    def workspace_bytes(cls, layers: Sequence[AttentionLayer], num_graphs: int) -> int:
        kinds = {_Kind.of(layer) for layer in layers}
        decodes = (1 + num_graphs) * (1 + _can_cascade(kinds))
        return _WORKSPACE_BYTES + len(kinds) * (1 + decodes) * _WRAPPER_BYTES + 4 * _MIN_GRAPH_INDICES

    @classmethod
    def unsupported(cls, layer: AttentionLayer, dtype: torch.dtype) -> str | None:
        if dtype not in (torch.float16, torch.bfloat16):
            return f"has attention in {str(dtype).removeprefix('torch.')} (set --torch_dtype_autocast bfloat16)"
        if layer.head_dim_qk != layer.head_dim_vo:
            return f"has keys of {layer.head_dim_qk} and values of {layer.head_dim_vo} numbers a head"
        if layer.head_dim_qk not in _HEAD_DIMS:
            return f"has a head_dim of {layer.head_dim_qk} (it can be {', '.join(map(str, _HEAD_DIMS))})"
        if layer.has_sinks:
            return "uses attention sinks"
        return None

    def warm_up(self) -> None:
        if not self._shared or self.num_pages < 3:
            return
        try:
            # two decodes that share a page: nothing is kept in pages yet
            length, two = self.page_size + 1, np.arange(2, dtype=np.int32)
            ones = two * 0 + 1
            metadata = AttentionMetadata(
                num_decodes=2, num_shared_pages=1, qo_indptr=np.arange(3, dtype=np.int32),
                kv_indptr=np.array([0, 2, 4], np.int32), kv_indices=np.array([0, 1, 0, 2], np.int32),
                kv_last_page_len=ones, kv_lens=ones * length, batch_indices=two, positions=ones * (length - 1),
            )  # fmt: skip
            self._plan(metadata, cascade=True)
            for index in {kind: index for index, kind in self._kinds.items()}.values():
                layer = self.layers[index]
                heads = layer.num_qo_heads, layer.num_kv_heads, layer.num_kv_heads
                q, k, v = (torch.zeros(2, n, layer.head_dim_qk, dtype=self.dtype, device=self.device) for n in heads)
                self.run(index, q, k, v)
        except RuntimeError as error:
            logger.warning("Requests that share a long prompt attend one by one (--cascade false): %s", error)
            self._shared.clear()

    def plan(self, metadata: AttentionMetadata) -> None:
        self._plan(metadata, self._is_worth_a_cascade(metadata))

    def _plan(self, metadata: AttentionMetadata, cascade: bool) -> None:
        meta, decodes = metadata.without_shared(self.page_size) if cascade else metadata, metadata.num_decodes
        self._await_copies()
        host, device = self._upload(
            meta.batch_indices, meta.positions, meta.kv_indices, meta.kv_indptr, meta.kv_last_page_len,
            meta.qo_indptr[decodes:] - decodes, meta.kv_indptr[decodes:] - meta.kv_indptr[decodes],
        )  # fmt: skip
        names = ("batch_indices", "positions", "kv_indices", "kv_indptr", "kv_last_page_len")
        self._append = dict(zip(names, device, strict=False))
        self._num_decodes = decodes
        _, _, _, kv_indptr, last_page_len, qo_indptr, prefill_indptr = host
        indices, split = device[2], int(meta.kv_indptr[decodes])
        if decodes:
            self._plan_decode(self._decode, kv_indptr[: decodes + 1], indices[:split], last_page_len[:decodes])
            self._running_decode = self._decode
            if cascade:
                self._running_decode = self._plan_cascade(self._shared, self._decode, metadata, decodes)
        for kind, wrapper in self._prefill.items():
            if decodes < len(meta.kv_lens):
                wrapper.plan(
                    qo_indptr,
                    prefill_indptr,
                    indices[split:],
                    last_page_len[decodes:],
                    kind.num_qo_heads,
                    kind.num_kv_heads,
                    kind.head_dim,
                    self.page_size,
                    causal=True,
                    sm_scale=kind.scaling,
                    window_left=kind.window_left,
                    logits_soft_cap=kind.softcap,
                    q_data_type=self.dtype,
                    kv_data_type=self.kv_dtype,
                )
        self._note_copies()

    def _plan_decode(
        self,
        wrappers: dict[_Kind, Any],
        kv_indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        queries: int = 1,
    ) -> None:
        """queries: of each request; the wrappers are given them as so many times the heads."""
        for kind, wrapper in wrappers.items():
            wrapper.plan(
                kv_indptr,
                indices,
                last_page_len,
                queries * kind.num_qo_heads,
                kind.num_kv_heads,
                kind.head_dim,
                self.page_size,
                window_left=kind.window_left,
                logits_soft_cap=kind.softcap,
                sm_scale=kind.scaling,
                q_data_type=self.dtype,
                kv_data_type=self.kv_dtype,
            )

    def _plan_cascade(
        self, shared: dict[_Kind, Any], own: dict[_Kind, Any], metadata: AttentionMetadata, size: int
    ) -> dict[_Kind, Any]:
        """For `size` queries. `own` is planned already."""
        pages = metadata.num_shared_pages
        (indptr, last_page_len, _), (_, _, indices) = self._upload(
            np.array([0, pages], np.int32), np.array([self.page_size], np.int32), metadata.kv_indices[:pages]
        )
        self._plan_decode(shared, indptr, indices, last_page_len, queries=size)
        merge = self._flashinfer.merge_state_in_place
        return {kind: _Cascade(kind, wrapper, own[kind], merge) for kind, wrapper in shared.items()}

    def _is_worth_a_cascade(self, meta: AttentionMetadata) -> bool:
        saved = (meta.num_decodes - 1) * meta.num_shared_pages * self._page_bytes
        return bool(self._shared) and saved >= _CASCADE_BYTES

    def prefers_eager(self, metadata: AttentionMetadata) -> bool:
        return len(metadata.kv_indices) > len(self._graph_indices) - _MAX_PADDING_ROWS

    def plan_graph(self, metadata: AttentionMetadata, size: int) -> bool:
        self._await_copies()
        cascade = self._is_worth_a_cascade(metadata)
        meta = metadata.without_shared(self.page_size) if cascade else metadata
        meta = meta.padded(size, scratch_page=self.num_pages)
        graph = self._graphs.get(size)
        if graph is None:
            graph = self._graphs[size] = self._make_graph_plan(size)
        (kv_indptr, last_page_len, _, _), (_, _, indices, positions) = self._upload(
            meta.kv_indptr, meta.kv_last_page_len, meta.kv_indices, meta.positions
        )
        graph.positions.copy_(positions)
        self._plan_decode(graph.wrappers, kv_indptr, indices, last_page_len)  # fills the other buffers
        self._append = {
            "batch_indices": graph.batch_indices,
            "positions": graph.positions,
            "kv_indices": self._graph_indices,
            "kv_indptr": graph.kv_indptr,
            "kv_last_page_len": graph.kv_last_page_len,
        }
        self._num_decodes = size
        self._running_decode = graph.wrappers
        if cascade:
            self._running_decode = self._plan_cascade(self._shared_in_graph(graph), graph.wrappers, metadata, size)
        self._note_copies()
        return cascade

    def _make_graph_plan(self, size: int) -> "_GraphPlan":
        def buffer(length: int) -> torch.Tensor:
            return torch.zeros(length, dtype=torch.int32, device=self.device)

        kv_indptr, kv_last_page_len = buffer(size + 1), buffer(size)
        wrappers = {
            kind: self._flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                "NHD",
                use_cuda_graph=True,
                use_tensor_cores=kind.use_tensor_cores,
                paged_kv_indptr_buffer=kv_indptr,
                paged_kv_indices_buffer=self._graph_indices,
                paged_kv_last_page_len_buffer=kv_last_page_len,
            )
            for kind in self._decode
        }
        batch_indices = torch.arange(size, dtype=torch.int32, device=self.device)
        return _GraphPlan(wrappers, {}, batch_indices, buffer(size), kv_indptr, kv_last_page_len)

    def _shared_in_graph(self, graph: _GraphPlan) -> dict[_Kind, Any]:
        for kind in self._shared:
            if kind not in graph.shared:
                indptr, last_page_len = (torch.zeros(n, dtype=torch.int32, device=self.device) for n in (2, 1))
                graph.shared[kind] = self._shared_wrapper(
                    use_cuda_graph=True,
                    paged_kv_indptr_buffer=indptr,
                    paged_kv_indices_buffer=self._shared_indices,
                    paged_kv_last_page_len_buffer=last_page_len,
                )
        return graph.shared

    def run(
        self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert sinks is None  # refused at load
        kind, cache, decodes = self._kinds[layer_idx], self._caches[layer_idx], self._num_decodes
        # the kernel checks neither bounds nor what lies between numbers: hand over what it expects
        k, v = (self._narrow(x if x.stride(-1) == 1 else x.contiguous()) for x in (k, v))
        self._flashinfer.append_paged_kv_cache(k, v, paged_kv_cache=cache, **self._append)
        q = q.contiguous()
        if decodes == len(q):
            return self._running_decode[kind].run(q, cache)  # type: ignore[no-any-return]
        if decodes == 0:
            return self._prefill[kind].run(q, cache)  # type: ignore[no-any-return]
        return torch.cat([self._running_decode[kind].run(q[:decodes], cache), self._prefill[kind].run(q[decodes:], cache)])

    def decoder_layers(
        self, parts: Mapping[int, DecoderParts], cos: torch.Tensor, sin: torch.Tensor, exact: bool = False
    ) -> RunLayers | None:
        if any(own.input_norm.weight.dtype != self.dtype for own in parts.values()):
            return None
        layers = [
            CudaDecoderLayer(own, layer.num_qo_heads, layer.num_kv_heads, layer.head_dim_qk, partial(self.run, index))
            for index, own in parts.items() if (layer := self.layers[index])
        ]  # fmt: skip
        return CudaDecoderLayers(layers, cos, sin, cuda_kernels(), exact)

    def gather(self, layer_idx: int, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self._caches[layer_idx][pages].to(self.dtype).permute(1, 3, 0, 2, 4).flatten(2, 3)
        return k, v

    def _upload(self, *arrays: Int32Array) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """int32 arrays, on the host and on the device, in one copy that nothing waits for."""
        host = torch.from_numpy(np.concatenate(arrays))
        if self.device.type == "cuda":
            host = host.pin_memory()  # planning reads it as well
        sizes = [len(array) for array in arrays]
        return list(torch.split(host, sizes)), list(torch.split(host.to(self.device, non_blocking=True), sizes))

    def _await_copies(self) -> None:
        """Of the last plan, out of pinned memory that the next one overwrites."""
        if self._copied is not None:
            self._copied.synchronize()

    def _note_copies(self) -> None:
        if self._copied is not None:
            self._copied.record()
