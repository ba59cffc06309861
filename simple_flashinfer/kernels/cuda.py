"""FlashInfer's kernels for the small layers, as functions of tensors on a CUDA device.

They are compiled when they are first used, and kept on disk. None of them waits for the device or keeps an address, so that
all may be captured into a CUDA graph. FlashInfer's fused_add_rmsnorm is left out: the sum of residual and layer output is a
line in the forward of transformers' decoder layers, between two modules, and can't be moved into the norm without writing
that forward anew.
"""

import functools
from typing import Any

import torch

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
            half = cos.shape[-1] // 2
            table = torch.cat([cos[0, :, :half], sin[0, :, :half]], -1).float()
            self._kept = cos, table, torch.arange(len(table), device=cos.device)
        _, table, rows = self._kept
        flat = (x[0].transpose(0, 1).flatten(1) for x in (q, k))  # [T, heads * dim]; no copy of a part of a wider matrix
        turned = self._flashinfer.apply_rope_with_cos_sin_cache(rows, *flat, q.shape[-1], table, is_neox=True)
        new_q, new_k = (y.view(len(y), x.shape[1], -1).transpose(0, 1)[None] for x, y in zip((q, k), turned, strict=True))
        return new_q, new_k

    def filter_probs(self, probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
        """probs float32 [rows, vocab], top_k int32 [rows], top_p float32 [rows] -> what top-k, then top-p leave of each row,
        its sum 1; the rest is 0. The same again for the same.
        """
        sampling = self._flashinfer.sampling
        left = sampling.top_k_renorm_probs(probs.contiguous(), top_k, is_deterministic=True)
        return sampling.top_p_renorm_probs(left, top_p, is_deterministic=True)  # type: ignore[no-any-return]


@functools.cache
def cuda_kernels() -> CudaKernels:
    """Raises ImportError."""
    return CudaKernels()
