"""FlashInfer's kernels for the small layers, as functions of tensors on a CUDA device, and decoder layers made of them.

They are compiled when they are first used, and kept on disk. None of them waits for the device or keeps an address, so that
all may be captured into a CUDA graph.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from simple_flashinfer.kernels.decoder_parts import DecoderParts, Norm
from simple_flashinfer.kernels.flashinfer import library


class CudaKernels:
    """Raises ImportError where flashinfer is missing."""

    rope_needs_equal_halves = True  # it reads the first half of cos and sin, and takes the second to be the same

    def __init__(self) -> None:
        self._flashinfer = library()
        # the cos of the last call, and what was made of it: all layers of a forward pass are given the same one
        self._kept: tuple[Any, ...] = (None,)

    @staticmethod
    def supports(dtype: torch.dtype) -> bool:
        """Of models whose layers it can compute."""
        return dtype in (torch.float16, torch.bfloat16)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., dim] or [..., heads, dim], weight [dim] -> weight * x / sqrt(mean(x^2) + eps), without gaps"""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        # rows of heads may lie in a wider matrix, as q and k do in the joined projection: no copy
        kept = 2 if x.dim() > 3 else 1
        rows, results = x.flatten(0, -kept - 1), out.flatten(0, -kept - 1)
        self._flashinfer.rmsnorm(rows if rows.stride(-1) == 1 else rows.contiguous(), weight, eps, out=results)
        return out

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x, residual [..., dim] without gaps, weight [dim]; adds x to the residual, and returns the norm of the sum in x.

        It is the norm of what the sum is before it is rounded, which a norm after an addition never sees.
        """
        self._flashinfer.fused_add_rmsnorm(x.flatten(0, -2), residual.flatten(0, -2), weight, eps)
        return x

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., 2 * dim], gate before up -> silu(gate) * up, [..., dim]"""
        return self._flashinfer.silu_and_mul(x.contiguous())  # type: ignore[no-any-return]  # it does not look at strides

    def rope(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k [1, heads, T, dim]; cos, sin [1, T, dim], their halves equal; the halves of q and k turn against each other.

        Returns the shapes of q and k, in memory with the heads of a token side by side.
        """
        if self._kept[0] is not cos:
            table = self.rope_table(cos[0], sin[0])
            self._kept = cos, table, torch.arange(len(table), device=cos.device)
        _, table, rows = self._kept
        q, k = self.rope_at(rows, q[0].transpose(0, 1), k[0].transpose(0, 1), table)
        return q.transpose(0, 1)[None], k.transpose(0, 1)[None]

    @staticmethod
    def rope_table(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """cos, sin [positions, dim], their halves equal -> float32 [positions, dim], half of it cos, half of it sin"""
        half = cos.shape[-1] // 2
        return torch.cat([cos[:, :half], sin[:, :half]], -1).float()

    def rope_at(
        self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T], rows of the table; q, k [T, heads, dim], which may be parts of a wider matrix. Returns new ones."""
        flat = q.flatten(1), k.flatten(1)
        new_q, new_k = self._flashinfer.apply_rope_with_cos_sin_cache(positions, *flat, q.shape[-1], table, is_neox=True)
        return new_q.view(q.shape), new_k.view(k.shape)

    def filter_probs(self, probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
        """probs float32 [rows, vocab], top_k int32 [rows], top_p float32 [rows] -> what top-k, then top-p leave of each row,
        its sum 1; the rest is 0. The same again for the same.
        """
        sampling = self._flashinfer.sampling
        left = sampling.top_k_renorm_probs(probs.contiguous(), top_k, is_deterministic=True)
        return sampling.top_p_renorm_probs(left, top_p, is_deterministic=True)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class CudaDecoderLayer:
    """attend: q [T, num_qo_heads, head_dim], k and v [T, num_kv_heads, head_dim] -> [T, num_qo_heads, head_dim]"""

    parts: DecoderParts
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class CudaDecoderLayers:
    """Layers that follow each other: a dozen launches each, where transformers' forward has more of them and much Python in
    between. What a layer adds to the residual is added by the next norm's kernel.
    """

    def __init__(
        self, layers: Sequence[CudaDecoderLayer], cos: torch.Tensor, sin: torch.Tensor, kernels: CudaKernels, exact: bool
    ) -> None:
        """cos, sin [positions, head_dim]. exact: sums are rounded before their norm is taken, as transformers does."""
        self._layers = layers
        self._table = kernels.rope_table(cos, sin)
        self._kernels = kernels
        self._exact = exact

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [1, T, hidden], which may be overwritten; positions int64 [T] -> [1, T, hidden]"""
        kernels, residual, added = self._kernels, x, None
        for layer in self._layers:
            parts = layer.parts
            x, residual = self._norm(parts.input_norm, residual, added)
            x = parts.o(self._attend(layer, parts.qkv(x), positions))
            x, residual = self._norm(parts.post_norm, residual, x)
            added = parts.down(kernels.silu_and_mul(parts.gate_up(x)))
        return residual if added is None else residual + added

    def _norm(self, norm: Norm, residual: torch.Tensor, added: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of the sum of the two, and the sum."""
        if added is not None and not self._exact:
            return self._kernels.add_rms_norm(added, residual, norm.weight, norm.eps), residual
        residual = residual if added is None else residual + added
        return self._kernels.rms_norm(residual, norm.weight, norm.eps), residual

    def _attend(self, layer: CudaDecoderLayer, qkv: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """qkv [1, T, all heads * head_dim] -> [1, T, num_qo_heads * head_dim]"""
        parts, dim, kernels = layer.parts, layer.head_dim, self._kernels
        sizes = [layer.num_qo_heads, layer.num_kv_heads, layer.num_kv_heads]
        q, k, v = torch.split(qkv.view(*qkv.shape[:2], -1, dim), sizes, dim=2)
        if parts.q_norm is not None:
            q = kernels.rms_norm(q, parts.q_norm.weight, parts.q_norm.eps)
        if parts.k_norm is not None:
            k = kernels.rms_norm(k, parts.k_norm.weight, parts.k_norm.eps)
        q, k = kernels.rope_at(positions, q[0], k[0], self._table)
        return layer.attend(q, k, v[0]).flatten(1)[None]


@functools.cache
def cuda_kernels() -> CudaKernels:
    """Raises ImportError."""
    return CudaKernels()
