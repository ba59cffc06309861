"""Paged attention by FlashInfer's kernels, on CUDA. The only file that imports flashinfer, and only when it is asked to.

A layer's cache is one [num_pages, 2, page_size, num_kv_heads, head_dim] tensor (NHD layout): K and V have equal strides,
for which FlashInfer needs no second compiled module. Layers that differ in scale, window, cap or shape are planned
apart: each kind of layer has one wrapper for decode and one for prefill, over one shared workspace (they run one
after the other on one stream).

For CUDA graphs each batch size has decode wrappers of its own over buffers that stay where they are; one page beyond the
pool takes what the padding rows write.

Requests with one query token take the decode wrapper, all others the prefill wrapper, which does chunks over a cached
prefix as well. Index arrays that `plan` reads on the host are given as CPU tensors, so that planning never waits for the
device; page numbers go to the device, where the kernels read them.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from simple_flashinfer.attention.base import AttentionBackend, AttentionLayer, AttentionMetadata
from simple_flashinfer.types import Int32Array

_WORKSPACE_BYTES = 256 << 20
_HEAD_DIMS = (64, 128, 256)
_MAX_PADDING_ROWS = 64  # in one decode graph
_TENSOR_CORE_GROUP = 4  # query heads per K/V head from which decode is faster on tensor cores


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


@dataclass(frozen=True, slots=True)
class _GraphPlan:
    """What a captured decode over one batch size reads: int32 on the device, filled anew by each plan."""

    wrappers: dict[_Kind, Any]
    batch_indices: torch.Tensor  # [size]
    positions: torch.Tensor  # [size]
    kv_indptr: torch.Tensor  # [size + 1]
    kv_last_page_len: torch.Tensor  # [size]


class FlashInferBackend(AttentionBackend):
    def _allocate(self) -> None:
        import flashinfer

        self._flashinfer = flashinfer
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        self._kinds = {index: _Kind.of(layer) for index, layer in self.layers.items()}
        self._prefill: dict[_Kind, Any] = {}
        self._decode: dict[_Kind, Any] = {}
        for kind in dict.fromkeys(self._kinds.values()):
            self._prefill[kind] = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
            self._decode[kind] = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                "NHD",
                use_tensor_cores=kind.use_tensor_cores,
            )
        self._graphs: dict[int, _GraphPlan] = {}
        # the pages of all requests are distinct; the rest is for padding rows, which repeat the scratch page
        self._graph_indices = torch.zeros(self.num_pages + _MAX_PADDING_ROWS, dtype=torch.int32, device=self.device)

        def pages(layer: AttentionLayer) -> torch.Tensor:
            shape = (self.num_pages + 1, 2, self.page_size, layer.num_kv_heads, layer.head_dim_qk)
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

        self._caches = {index: pages(layer) for index, layer in self.layers.items()}

    @staticmethod
    def require_library() -> None:
        if importlib.util.find_spec("flashinfer") is None:
            raise ImportError(
                "attention_backend flashinfer needs the package flashinfer-python; "
                "install it with: pip install 'simple-flashinfer[cuda]'"
            )

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

    def plan(self, metadata: AttentionMetadata) -> None:
        meta, decodes = metadata, metadata.num_decodes
        self._num_decodes = decodes
        self._append = {
            "batch_indices": self._on_device(meta.batch_indices),
            "positions": self._on_device(meta.positions),
            "kv_indices": self._on_device(meta.kv_indices),
            "kv_indptr": self._on_device(meta.kv_indptr),
            "kv_last_page_len": self._on_device(meta.kv_last_page_len),
        }
        indices = self._append["kv_indices"]
        split = int(meta.kv_indptr[decodes])
        self._running_decode = self._decode
        if decodes:
            self._plan_decode(self._decode, meta, indices[:split])
        for kind, wrapper in self._prefill.items():
            if decodes < len(meta.kv_lens):
                wrapper.plan(
                    torch.from_numpy(meta.qo_indptr[decodes:] - decodes),
                    torch.from_numpy(meta.kv_indptr[decodes:] - split),
                    indices[split:],
                    torch.from_numpy(meta.kv_last_page_len[decodes:]),
                    kind.num_qo_heads,
                    kind.num_kv_heads,
                    kind.head_dim,
                    self.page_size,
                    causal=True,
                    sm_scale=kind.scaling,
                    window_left=kind.window_left,
                    logits_soft_cap=kind.softcap,
                    q_data_type=self.dtype,
                    kv_data_type=self.dtype,
                )

    def _plan_decode(self, wrappers: dict[_Kind, Any], meta: AttentionMetadata, indices: torch.Tensor) -> None:
        """Plans the first num_decodes requests, whose pages are `indices`."""
        for kind, wrapper in wrappers.items():
            wrapper.plan(
                torch.from_numpy(meta.kv_indptr[: meta.num_decodes + 1]),
                indices,
                torch.from_numpy(meta.kv_last_page_len[: meta.num_decodes]),
                kind.num_qo_heads,
                kind.num_kv_heads,
                kind.head_dim,
                self.page_size,
                window_left=kind.window_left,
                logits_soft_cap=kind.softcap,
                sm_scale=kind.scaling,
                q_data_type=self.dtype,
                kv_data_type=self.dtype,
            )

    def plan_graph(self, metadata: AttentionMetadata, size: int) -> None:
        meta = metadata.padded(size, scratch_page=self.num_pages)
        graph = self._graphs.get(size)
        if graph is None:
            graph = self._graphs[size] = self._make_graph_plan(size)
        graph.positions.copy_(torch.from_numpy(meta.positions))
        self._plan_decode(graph.wrappers, meta, self._on_device(meta.kv_indices))  # fills the other buffers
        self._append = {
            "batch_indices": graph.batch_indices,
            "positions": graph.positions,
            "kv_indices": self._graph_indices,
            "kv_indptr": graph.kv_indptr,
            "kv_last_page_len": graph.kv_last_page_len,
        }
        self._num_decodes = size
        self._running_decode = graph.wrappers

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
        return _GraphPlan(wrappers, batch_indices, buffer(size), kv_indptr, kv_last_page_len)

    def run(
        self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert sinks is None  # refused at load
        kind, cache, decodes = self._kinds[layer_idx], self._caches[layer_idx], self._num_decodes
        # the kernel checks neither bounds nor strides beyond the last: hand over what it expects
        self._flashinfer.append_paged_kv_cache(k.contiguous(), v.contiguous(), paged_kv_cache=cache, **self._append)
        q = q.contiguous()
        if decodes == len(q):
            return self._running_decode[kind].run(q, cache)  # type: ignore[no-any-return]
        if decodes == 0:
            return self._prefill[kind].run(q, cache)  # type: ignore[no-any-return]
        return torch.cat([self._running_decode[kind].run(q[:decodes], cache), self._prefill[kind].run(q[decodes:], cache)])

    def gather(self, layer_idx: int, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self._caches[layer_idx][pages].permute(1, 3, 0, 2, 4).flatten(2, 3)
        return k, v

    def _on_device(self, array: Int32Array) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)
