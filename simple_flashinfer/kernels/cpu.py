"""The CPU kernels as functions of tensors.

Calls go through ctypes: about 2 us each. The small ones keep the interpreter's lock, since giving it away and asking for it
again would take longer than they run; matmuls and attention let it go.
"""

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from simple_flashinfer.kernels.compiler import library_path

_DTYPES = {torch.bfloat16: "SCALAR_BF16", torch.float16: "SCALAR_F16", torch.float32: "SCALAR_F32"}
_LANES = 16

_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def supports(dtype: torch.dtype) -> bool:
    return dtype in _DTYPES


class Linear:
    """x W^T + bias over packed weights; with int8, weights are rounded to 8 bits relative to the largest of each output."""

    def __init__(self, library: ctypes.CDLL, weight: torch.Tensor, bias: torch.Tensor | None, int8: bool) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._bias = None if bias is None else bias.contiguous()
        if int8:
            scales = (weight.abs().amax(1).float() / 127).clamp_min(1e-30)
            weight = (weight / scales[:, None]).round_().to(torch.int8)
            self._multiply = library.linear_int8
            self.tensors: tuple[torch.Tensor, ...] = _pack(weight, 2), scales
        else:
            self._multiply = library.linear_plain
            self.tensors = (_pack(weight, library.linear_pair()),)
        tensors = *self.tensors, self._bias
        self._pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]. Raises TypeError for another dtype than the weights'."""
        if x.dtype != self.dtype:
            raise TypeError(f"the input of this layer is {x.dtype}, its weights were {self.dtype}")
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.out_features)
        rows = x.numel() // self.in_features
        self._multiply(x.data_ptr(), *self._pointers, out.data_ptr(), rows, self.in_features, self.out_features)
        return out


def _pack(weight: torch.Tensor, pair: int) -> torch.Tensor:
    """[out, in] -> [out / 16, in / pair, 16, pair], out padded with zeros"""
    rows, columns = weight.shape
    padding = -rows % _LANES
    if padding:
        weight = torch.cat([weight, weight.new_zeros(padding, columns)])
    return weight.view(-1, _LANES, columns // pair, pair).transpose(1, 2).contiguous()


class CpuKernels:
    """Those between and in the matmuls, for one dtype. All tensors are on the CPU, in that dtype. Raises CompileError."""

    rope_needs_equal_halves = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        with ThreadPoolExecutor() as pool:  # of compilers
            paths = pool.map(
                lambda source: str(library_path(source, {_DTYPES[dtype]: 1})), ("elementwise.cpp", "linear.cpp")
            )
        elementwise, linear = paths
        library = ctypes.PyDLL(elementwise)
        self._rms_norm = library.rms_norm
        self._rms_norm.argtypes = [*[_pointer] * 3, _int, _int, _float]
        self._silu_and_mul = library.silu_and_mul
        self._silu_and_mul.argtypes = [*[_pointer] * 2, _int, _int]
        self._rope = library.rope
        self._rope.argtypes = [_pointer, _int, _int, *[_pointer] * 3, _int, _int, _int]
        self._linear = ctypes.CDLL(str(linear))
        self._linear.linear_plain.argtypes = [*[_pointer] * 4, *[_int] * 3]
        self._linear.linear_int8.argtypes = [*[_pointer] * 5, *[_int] * 3]

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None, int8: bool = False) -> Linear | None:
        """weight [out, in], bias [out]. None for what the kernels don't do: another dtype, an odd number of inputs."""
        possible = weight.dtype == self.dtype and weight.shape[1] % 2 == 0
        return Linear(self._linear, weight, bias, int8) if possible else None

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

    def rope(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k [1, heads, T, dim], their last dimension without gaps; cos, sin [1, T, dim], without gaps; the halves of q
        and k turn against each other. Returns the shapes of q and k, in memory with the heads of a token side by side.
        """
        return self._turn(q, cos, sin), self._turn(k, cos, sin)

    def _turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        _, heads, tokens, dim = x.shape
        _, head_stride, token_stride, _ = x.stride()
        out = x.new_empty(1, tokens, heads, dim)
        self._rope(
            x.data_ptr(), token_stride, head_stride, cos.data_ptr(), sin.data_ptr(), out.data_ptr(), tokens, heads, dim
        )  # fmt: skip
        return out.transpose(1, 2)


@functools.cache
def cpu_kernels(dtype: torch.dtype) -> CpuKernels:
    """Raises CompileError."""
    return CpuKernels(dtype)


def array_pointer(array: np.ndarray) -> int:
    """Of an int32 array without gaps, which must outlive its use."""
    assert array.dtype == np.int32
    assert array.flags.c_contiguous
    return int(array.__array_interface__["data"][0])


class Attention:
    """Attention and appending for one dtype, head size, number of query heads a K/V head, and page size.

    The caches are [num_pages, kv_heads, page_size, head_dim]. Raises CompileError.
    """

    def __init__(self, dtype: torch.dtype, head_dim: int, group: int, page_size: int) -> None:
        macros = {_DTYPES[dtype]: 1, "HEAD_DIM": head_dim, "GROUP": group, "PAGE_SIZE": page_size}
        path = str(library_path("attention.cpp", macros))
        self._append = ctypes.PyDLL(path).append
        self._append.argtypes = [*[_pointer] * 2, *[_int] * 4, *[_pointer] * 4, *[_int] * 2]
        self._attend = ctypes.CDLL(path).attention
        self._attend.argtypes = [_pointer, _int, _int, *[_pointer] * 6, *[_int] * 3, _float, _float, *[_pointer] * 2]

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
            k_cache.data_ptr(), v_cache.data_ptr(), pages, rows, tokens, kv_heads,
        )  # fmt: skip

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        indices: tuple[int, int, int, int],
        num_requests: int,
        *,
        window: int | None,
        scaling: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """q [T, heads, head_dim] -> the same shape. indices point to the int32 arrays qo_indptr, kv_indptr, kv_indices and
        kv_lens of AttentionMetadata; sinks float32 [heads].
        """
        out = q.new_empty(q.shape)
        self._attend(
            q.data_ptr(), q.stride(0), q.stride(1), k_cache.data_ptr(), v_cache.data_ptr(), *indices,
            num_requests, k_cache.shape[1], window or 1 << 40, scaling, softcap or 0.0,
            None if sinks is None else sinks.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out


@functools.cache
def attention(dtype: torch.dtype, head_dim: int, group: int, page_size: int) -> Attention:
    """Raises CompileError."""
    return Attention(dtype, head_dim, group, page_size)
