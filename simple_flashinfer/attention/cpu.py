"""Paged attention on the CPU by kernels that read K and V where they lie: no gather, no padding, no masks.

One step of 32 sequences at 260 tokens (9 query and 3 K/V heads of 64, bfloat16, 2 cores), each layer, none of it in caches:
280 us, 23 GB/s. A gather and torch's matmuls (attention/sdpa.py) take over four times as long.
"""

from collections.abc import Mapping

import torch

from simple_flashinfer.attention.base import AttentionLayer, AttentionMetadata, RunLayers
from simple_flashinfer.attention.sdpa import SdpaBackend
from simple_flashinfer.kernels.compiler import CompileError
from simple_flashinfer.kernels.cpu import PAGE_MULTIPLE, Attention, Batch, Linear, attention, cpu_kernels, supports
from simple_flashinfer.kernels.decoder_layers import DecoderLayer, DecoderLayers
from simple_flashinfer.kernels.decoder_parts import DecoderParts


def _kernel(layer: AttentionLayer, dtype: torch.dtype, page_size: int = 16) -> Attention:
    return attention(dtype, layer.head_dim_qk, layer.num_qo_heads // layer.num_kv_heads, page_size)


class CpuBackend(SdpaBackend):
    """The same pages, another way to fill and to read them."""

    def _allocate(self) -> None:
        assert self.kv_dtype == self.dtype  # settled at start: the kernels know one dtype
        if self.page_size % PAGE_MULTIPLE:
            raise ValueError(f"the kernels for the CPU need pages of a multiple of {PAGE_MULTIPLE} tokens")
        super()._allocate()
        self._kernels = {index: _kernel(layer, self.dtype, self.page_size) for index, layer in self.layers.items()}

    @classmethod
    def unsupported(cls, layer: AttentionLayer, dtype: torch.dtype) -> str | None:
        if not supports(dtype):
            return f"attends in {str(dtype).removeprefix('torch.')}"
        if layer.head_dim_qk != layer.head_dim_vo or not Attention.supports_head_dim(layer.head_dim_qk):
            return f"has K heads of {layer.head_dim_qk} and V heads of {layer.head_dim_vo} dimensions"
        try:
            _kernel(layer, dtype)
        except CompileError as error:
            return f"needs kernels in C++, and {error}"
        return None

    def plan(self, metadata: AttentionMetadata) -> None:
        meta = metadata
        pages = meta.kv_indices[meta.kv_indptr[meta.batch_indices] + meta.positions // self.page_size]
        self._batch = Batch.of(
            pages, meta.positions % self.page_size, meta.qo_indptr, meta.kv_indptr, meta.kv_indices, meta.kv_lens
        )

    def run(
        self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        layer, kernel = self.layers[layer_idx], self._kernels[layer_idx]
        k_cache, v_cache = self._caches[layer_idx]
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        kernel.append(k, v, k_cache, v_cache, self._batch)
        return kernel.attend(
            q, k_cache, v_cache, self._batch,
            window=layer.sliding_window, scaling=layer.scaling, softcap=layer.softcap,
            sinks=None if sinks is None else sinks.float(),
        )  # fmt: skip

    def gather(self, layer_idx: int, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self._kernels[layer_idx].unpacked(*(cache[pages] for cache in self._caches[layer_idx]))
        return k.transpose(0, 1).flatten(1, 2), v.transpose(0, 1).flatten(1, 2)

    def decoder_layers(
        self, parts: Mapping[int, DecoderParts], cos: torch.Tensor, sin: torch.Tensor, exact: bool = False
    ) -> RunLayers | None:
        """Exact in any case."""
        linears = [linear for own in parts.values() for linear in own.matmuls]
        if not all(isinstance(linear, Linear) and linear.dtype == self.dtype for linear in linears):
            return None
        if any(layer.has_sinks for layer in self.layers.values()):
            return None
        if len({(self.layers[index].head_dim_qk, own.input_norm.weight.numel()) for index, own in parts.items()}) > 1:
            return None
        described = [
            DecoderLayer(
                own, self._kernels[index], *self._caches[index], num_qo_heads=layer.num_qo_heads,
                window=layer.sliding_window, scaling=layer.scaling, softcap=layer.softcap,
            )
            for index, own in parts.items() if (layer := self.layers[index])
        ]  # fmt: skip
        layers = DecoderLayers(described, cpu_kernels(self.dtype))

        def run(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return layers(x, cos.index_select(0, positions)[None], sin.index_select(0, positions)[None], self._batch)

        return run
