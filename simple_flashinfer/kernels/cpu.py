"""The CPU kernels as functions of tensors.

Calls go through ctypes: about 2 us each. The small ones keep the interpreter's lock, since giving it away and asking for it
again would take longer than they run; attention lets it go.
"""

import ctypes
import functools

import numpy as np
import torch

from simple_flashinfer.kernels.compiler import library_path

_DTYPES = {torch.bfloat16: "SCALAR_BF16", torch.float16: "SCALAR_F16", torch.float32: "SCALAR_F32"}
_LANES = 16

_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def supports(dtype: torch.dtype) -> bool:
    return dtype in _DTYPES


class Elementwise:
    """Norm, rotary embedding and gated activation of one dtype. All tensors are on the CPU, in that dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        library = ctypes.PyDLL(str(library_path("elementwise.cpp", {_DTYPES[dtype]: 1})))
        self._rms_norm = library.rms_norm
        self._rms_norm.argtypes = [*[_pointer] * 3, _int, _int, _float]
        self._silu_and_mul = library.silu_and_mul
        self._silu_and_mul.argtypes = [*[_pointer] * 2, _int, _int]
        self._rope = library.rope
        self._rope.argtypes = [_pointer, _int, _int, *[_pointer] * 3, _int, _int, _int]

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., dim], weight [dim] without gaps -> weight * x / sqrt(mean(x^2) + eps)"""
        x = x.contiguous()
        out = torch.empty_like(x)
        dim = x.shape[-1]
        self._rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // dim, dim, eps)
        return out

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., 2 * dim], gate before up -> silu(gate) * up, [..., dim]"""
        x = x.contiguous()
        dim = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], dim)
        self._silu_and_mul(x.data_ptr(), out.data_ptr(), out.numel() // dim, dim)
        return out

    def rope(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [1, heads, T, dim], its last dimension without gaps; cos, sin [1, T, dim], without gaps; the halves of x turn
        against each other. Returns [1, heads, T, dim], in memory with the heads of a token side by side.
        """
        _, heads, tokens, dim = x.shape
        _, head_stride, token_stride, _ = x.stride()
        out = x.new_empty(1, tokens, heads, dim)
        self._rope(
            x.data_ptr(), token_stride, head_stride, cos.data_ptr(), sin.data_ptr(), out.data_ptr(), tokens, heads, dim
        )  # fmt: skip
        return out.transpose(1, 2)


@functools.cache
def elementwise(dtype: torch.dtype) -> Elementwise:
    """Raises CompileError."""
    return Elementwise(dtype)


def array_pointer(array: np.ndarray) -> int:
    """Of an int32 array without gaps, which must outlive its use."""
    assert array.dtype == np.int32
    assert array.flags.c_contiguous
    return int(array.__array_interface__["data"][0])


class DecodeAttention:
    """Attention and appending for one dtype, head size and number of query heads a K/V head.

    The caches are [num_pages, kv_heads, page_size, head_dim]. Raises CompileError.
    """

    def __init__(self, dtype: torch.dtype, head_dim: int, group: int) -> None:
        path = str(library_path("decode_attention.cpp", {_DTYPES[dtype]: 1, "HEAD_DIM": head_dim, "GROUP": group}))
        self._append = ctypes.PyDLL(path).append
        self._append.argtypes = [*[_pointer] * 2, *[_int] * 4, *[_pointer] * 4, *[_int] * 3]
        self._attend = ctypes.CDLL(path).decode_attention
        self._attend.argtypes = [_pointer, _int, _int, *[_pointer] * 5, *[_int] * 4, _float, _float, *[_pointer] * 2]

    @staticmethod
    def supports_head_dim(head_dim: int) -> bool:
        return head_dim % _LANES == 0 and head_dim <= 256

    def append(
        self, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, pages: int, rows: int
    ) -> None:
        """k, v [T, kv_heads, head_dim]; pages and rows point to int32 [T]: where each token goes."""
        tokens, kv_heads, _ = k.shape
        self._append(
            k.data_ptr(), v.data_ptr(), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            k_cache.data_ptr(), v_cache.data_ptr(), pages, rows, tokens, kv_heads, k_cache.shape[2],
        )  # fmt: skip

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        indptr: int,
        indices: int,
        kv_lens: int,
        out: torch.Tensor,
        *,
        window: int | None,
        scaling: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> None:
        """One query token a request: q [R, heads, head_dim]; indptr [R + 1], indices and kv_lens [R] point to int32, as in
        AttentionMetadata; out like q, without gaps; sinks float32 [heads].
        """
        _, kv_heads, page_size, _ = k_cache.shape
        self._attend(
            q.data_ptr(), q.stride(0), q.stride(1), k_cache.data_ptr(), v_cache.data_ptr(), indptr, indices, kv_lens,
            q.shape[0], kv_heads, page_size, window or 1 << 40, scaling, softcap or 0.0,
            None if sinks is None else sinks.data_ptr(), out.data_ptr(),
        )  # fmt: skip


@functools.cache
def decode_attention(dtype: torch.dtype, head_dim: int, group: int) -> DecodeAttention:
    """Raises CompileError."""
    return DecodeAttention(dtype, head_dim, group)
