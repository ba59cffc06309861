"""Paged attention on the CPU at the speed of its memory: decodes go through a kernel that reads K and V where they lie.

What is computed many tokens at a time (prompts) is bound by arithmetic, not by memory, and stays with torch. One step of
16 sequences at 384 tokens (9 query and 3 K/V heads of 64, bfloat16, 2 cores), each layer: 175 us, 27 GB/s, against 776 us
with a gather and torch's matmuls (attention/sdpa.py).
"""

import numpy as np
import torch

from simple_flashinfer.attention.base import AttentionLayer
from simple_flashinfer.attention.sdpa import SdpaBackend
from simple_flashinfer.kernels.compiler import CompileError
from simple_flashinfer.kernels.cpu import DecodeAttention, array_pointer, decode_attention, supports


def _kernel(layer: AttentionLayer, dtype: torch.dtype) -> DecodeAttention:
    return decode_attention(dtype, layer.head_dim_qk, layer.num_qo_heads // layer.num_kv_heads)


class CpuBackend(SdpaBackend):
    def _allocate(self) -> None:
        super()._allocate()
        self._kernels = {index: _kernel(layer, self.dtype) for index, layer in self.layers.items()}

    @classmethod
    def unsupported(cls, layer: AttentionLayer, dtype: torch.dtype) -> str | None:
        if not supports(dtype):
            return f"attends in {str(dtype).removeprefix('torch.')}"
        if layer.head_dim_qk != layer.head_dim_vo or not DecodeAttention.supports_head_dim(layer.head_dim_qk):
            return f"has K heads of {layer.head_dim_qk} and V heads of {layer.head_dim_vo} dimensions"
        try:
            _kernel(layer, dtype)
        except CompileError as error:
            return f"needs kernels in C++, and {error}"
        return None

    def _plan_append(self) -> None:
        meta, count = self._metadata, self._metadata.num_decodes
        pages = meta.kv_indices[meta.kv_indptr[meta.batch_indices] + meta.positions // self.page_size]
        # held here: the kernels get pointers
        self._arrays = [
            np.ascontiguousarray(array, np.int32)
            for array in (pages, meta.positions % self.page_size, meta.kv_indptr[: count + 1], meta.kv_indices, meta.kv_lens)
        ]
        self._pointers = [array_pointer(array) for array in self._arrays]

    def run(
        self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        layer, kernel = self.layers[layer_idx], self._kernels[layer_idx]
        k_cache, v_cache = self._caches[layer_idx]
        pages, rows, indptr, indices, kv_lens = self._pointers
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        kernel.append(k, v, k_cache, v_cache, pages, rows)
        out = q.new_empty(q.shape)
        count = self._metadata.num_decodes
        if count:
            kernel.attend(
                q[:count], k_cache, v_cache, indptr, indices, kv_lens, out,
                window=layer.sliding_window, scaling=layer.scaling, softcap=layer.softcap,
                sinks=None if sinks is None else sinks.float(),
            )  # fmt: skip
        if count < len(q):
            self._attend_groups(layer, q, k, v, sinks, out, self._plan_groups(layer.sliding_window, first=count))
        return out
