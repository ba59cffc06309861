"""`--compare-sdpa-prefill`: how far a backend's prefill is from float32 torch attention. Changes no output."""

import logging

import numpy as np
import torch

from simple_flashinfer.attention.base import AttentionBackend, AttentionLayer, AttentionMetadata
from simple_flashinfer.attention.eager import causal_mask, grouped_attention

logger = logging.getLogger(__name__)


class ComparingBackend(AttentionBackend):
    """Runs another backend, and the reference beside it over the same pages."""

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend
        super().__init__(
            list(backend.layers.values()),
            num_pages=backend.num_pages,
            page_size=backend.page_size,
            dtype=backend.dtype,
            device=backend.device,
            kv_dtype=backend.kv_dtype,
        )

    def _allocate(self) -> None:
        """The pages are the other backend's."""

    @classmethod
    def unsupported(cls, layer: AttentionLayer, dtype: torch.dtype) -> str | None:
        return None

    def plan(self, metadata: AttentionMetadata) -> None:
        self._metadata = metadata
        self._backend.plan(metadata)

    def prefers_eager(self, metadata: AttentionMetadata) -> bool:
        return self._backend.prefers_eager(metadata)

    def plan_graph(self, metadata: AttentionMetadata, size: int) -> bool:
        self._metadata = metadata  # all of them decodes: there is nothing to compare
        return self._backend.plan_graph(metadata, size)

    def run(
        self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = self._backend.run(layer_idx, q, k, v, sinks)
        meta = self._metadata
        worst = [
            self._difference(layer_idx, request, q, out, sinks) for request in range(meta.num_decodes, len(meta.kv_lens))
        ]
        if worst:
            logger.info(
                "layer %d: prefill attention of %d requests differs from float32 torch by at most %.2e",
                layer_idx, len(worst), max(worst),
            )  # fmt: skip
        return out

    def _difference(
        self, layer_idx: int, request: int, q: torch.Tensor, out: torch.Tensor, sinks: torch.Tensor | None
    ) -> float:
        meta, layer = self._metadata, self.layers[layer_idx]
        pages = meta.kv_indices[meta.kv_indptr[request] : meta.kv_indptr[request + 1]]
        tokens = slice(int(meta.qo_indptr[request]), int(meta.qo_indptr[request + 1]))
        kv_len = int(meta.kv_lens[request])
        k, v = self.gather(layer_idx, torch.from_numpy(pages.astype(np.int64)).to(q.device))
        positions = torch.from_numpy(meta.positions[tokens]).to(q.device)
        mask = causal_mask(positions, torch.arange(kv_len, device=q.device), layer.sliding_window)
        heads = _by_kv_head(q[tokens], layer.num_kv_heads)
        reference = grouped_attention(
            heads[None].float(),
            k[None, :, :kv_len].float(),
            v[None, :, :kv_len].float(),
            mask[None],
            layer.scaling,
            layer.softcap,
            sinks,
        )
        got = _by_kv_head(out[tokens], layer.num_kv_heads)
        return float((reference[0] - got.float()).abs().max())

    def gather(self, layer_idx: int, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._backend.gather(layer_idx, pages)


def _by_kv_head(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[T, H, D] -> [num_kv_heads, H / num_kv_heads, T, D]"""
    return x.transpose(0, 1).reshape(num_kv_heads, -1, len(x), x.shape[-1])
