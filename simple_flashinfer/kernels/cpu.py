"""The CPU kernels as functions of tensors.

Calls go through ctypes: about 2 us each. The small ones keep the interpreter's lock, since giving it away and asking for it
again would take longer than they run; matmuls, attention, draws and whole layers let it go.
"""

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from simple_flashinfer.kernels.compiler import library_path

_DTYPES = {torch.bfloat16: "SCALAR_BF16", torch.float16: "SCALAR_F16", torch.float32: "SCALAR_F32"}
_DRAW_PARAMETERS = (np.float32, np.int32, np.float64, np.float32, np.float64)
_LANES = 16
PAGE_MULTIPLE = _LANES  # what page sizes must be a multiple of, since K and V come in tiles of tokens
EVERYTHING = 1 << 40  # a window that no request is longer than

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
            self.multiply = library.linear_int8
            self.tensors: tuple[torch.Tensor, ...] = _pack(weight, 2), scales
        else:
            self.multiply = library.linear_plain
            self.tensors = (_pack(weight, library.linear_pair()),)
        held = self.tensors[0], scales if int8 else None, self._bias
        self.pointers = [None if tensor is None else tensor.data_ptr() for tensor in held]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]. Raises TypeError for another dtype than the weights'."""
        if x.dtype != self.dtype:
            raise TypeError(f"the input of this layer is {x.dtype}, its weights were {self.dtype}")
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.out_features)
        rows = x.numel() // self.in_features
        self.multiply(x.data_ptr(), *self.pointers, out.data_ptr(), rows, self.in_features, self.out_features)
        return out


def _pack(weight: torch.Tensor, pair: int) -> torch.Tensor:
    """[out, in] -> [out / 16, in / pair, 16, pair], out padded with zeros"""
    rows, columns = weight.shape
    padding = -rows % _LANES
    if padding:
        weight = torch.cat([weight, weight.new_zeros(padding, columns)])
    return weight.view(-1, _LANES, columns // pair, pair).transpose(1, 2).contiguous()


class CpuKernels:
    """All but attention, for one dtype. All tensors are on the CPU, in that dtype. Raises CompileError."""

    rope_needs_equal_halves = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        with ThreadPoolExecutor() as pool:  # of compilers
            sources = ("elementwise.cpp", "linear.cpp", "decoder_layers.cpp", "sampling.cpp")
            paths = pool.map(lambda source: str(library_path(source, {_DTYPES[dtype]: 1})), sources)
        elementwise, linear, decoder_layers, sampling = paths
        library = ctypes.PyDLL(elementwise)
        self.rms_norm_function = library.rms_norm
        self.rms_norm_function.argtypes = [_pointer, _int, *[_pointer] * 2, *[_int] * 3, _float]
        self.silu_and_mul_function = library.silu_and_mul
        self.silu_and_mul_function.argtypes = [*[_pointer] * 2, _int, _int]
        self.rope_function = library.rope
        self.rope_function.argtypes = [_pointer, _int, _int, *[_pointer] * 3, _int, _int, _int]
        sampler = ctypes.CDLL(sampling)
        self._draw = {dtype: sampler.draw_scalars, torch.float32: sampler.draw_floats}
        for draw in self._draw.values():
            draw.argtypes = [*[_pointer] * 7, *[_int] * 2]
        self._linear = ctypes.CDLL(linear)
        for multiply in (self._linear.linear_plain, self._linear.linear_int8):
            multiply.argtypes = [*[_pointer] * 5, *[_int] * 3]
        self.decoder_layers_function = ctypes.CDLL(decoder_layers).decoder_layers
        self.decoder_layers_function.argtypes = [_pointer, _int, *[_pointer] * 5]

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None, int8: bool = False) -> Linear | None:
        """weight [out, in], bias [out]. None for what the kernels don't do: another dtype, an odd number of inputs."""
        possible = weight.dtype == self.dtype and weight.shape[1] % 2 == 0
        return Linear(self._linear, weight, bias, int8) if possible else None

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., dim], weight [dim] without gaps -> weight * x / sqrt(mean(x^2) + eps)"""
        x = x.contiguous()
        out = torch.empty_like(x)
        dim = x.shape[-1]
        self.rms_norm_function(x.data_ptr(), dim, weight.data_ptr(), out.data_ptr(), x.numel() // dim, 1, dim, eps)
        return out

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., 2 * dim], gate before up -> silu(gate) * up, [..., dim]"""
        x = x.contiguous()
        dim = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], dim)
        self.silu_and_mul_function(x.data_ptr(), out.data_ptr(), out.numel() // dim, dim)
        return out

    def draw(self, logits: torch.Tensor, *parameters: np.ndarray) -> torch.Tensor:
        """logits [S, V] of this dtype or float32 -> int64 [S], -1 where the largest is not finite, or one is NaN.

        parameters: temperature float32, top_k int32, top_p float64, min_p float32, uniform numbers float64, [S] each, as in
        `sampling.SamplingBatch`.
        """
        logits, tokens = logits.contiguous(), torch.empty(len(logits), dtype=torch.int64)
        held = [np.ascontiguousarray(array, dtype) for array, dtype in zip(parameters, _DRAW_PARAMETERS, strict=True)]
        pointers = [array.__array_interface__["data"][0] for array in held]
        self._draw[logits.dtype](logits.data_ptr(), *pointers, tokens.data_ptr(), *logits.shape)
        return tokens

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
        self.rope_function(
            x.data_ptr(), token_stride, head_stride, cos.data_ptr(), sin.data_ptr(), out.data_ptr(), tokens, heads, dim
        )  # fmt: skip
        return out.transpose(1, 2)


@functools.cache
def cpu_kernels(dtype: torch.dtype) -> CpuKernels:
    """Raises CompileError."""
    return CpuKernels(dtype)


class Batch(ctypes.Structure):
    """What the tokens of a step attend to, and where their keys and values go; see AttentionMetadata."""

    _fields_ = (
        ("tokens", _int), ("requests", _int), ("pages", _pointer), ("rows", _pointer), ("qo_indptr", _pointer),
        ("kv_indptr", _pointer), ("kv_indices", _pointer), ("kv_lens", _pointer),
    )  # fmt: skip

    @classmethod
    def of(cls, *arrays: np.ndarray) -> "Batch":
        """pages and rows [T], qo_indptr, kv_indptr, kv_indices, kv_lens [R]."""
        held = [np.ascontiguousarray(array, np.int32) for array in arrays]
        batch = cls(len(held[0]), len(held[-1]), *(array.__array_interface__["data"][0] for array in held))
        batch.held = held  # pointers keep nothing alive
        return batch


class Attention:
    """Attention and appending for one dtype, head size, number of query heads a K/V head, and page size.

    The caches take the room of [num_pages, kv_heads, page_size, head_dim]; in what order is the kernels' own. Raises
    CompileError.
    """

    def __init__(self, dtype: torch.dtype, head_dim: int, group: int, page_size: int) -> None:
        macros = {_DTYPES[dtype]: 1, "HEAD_DIM": head_dim, "GROUP": group, "PAGE_SIZE": page_size}
        path = str(library_path("attention.cpp", macros))
        self._pair = int(ctypes.CDLL(path).pair())
        self.append_function = ctypes.PyDLL(path).append
        self.append_function.argtypes = [*[_pointer] * 2, *[_int] * 4, *[_pointer] * 3, _int]
        self.attention_function = ctypes.CDLL(path).attention
        self.attention_function.argtypes = [
            _pointer,
            _int,
            _int,
            *[_pointer] * 3,
            _int,
            _int,
            _float,
            _float,
            *[_pointer] * 2,
        ]

    @staticmethod
    def supports_head_dim(head_dim: int) -> bool:
        return head_dim % _LANES == 0 and head_dim <= 256

    def unpacked(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages as they are kept -> the same as [num_pages, kv_heads, page_size, head_dim]."""
        pages, heads, size, dim = k.shape
        k = k.view(pages, heads, size // _LANES, dim // self._pair, _LANES, self._pair).transpose(3, 4)
        v = v.view(pages, heads, size // self._pair, dim, self._pair).transpose(3, 4)
        return k.reshape(pages, heads, size, dim), v.reshape(pages, heads, size, dim)

    def append(self, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: Batch) -> None:
        """k, v [T, kv_heads, head_dim]"""
        self.append_function(
            k.data_ptr(), v.data_ptr(), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            k_cache.data_ptr(), v_cache.data_ptr(), ctypes.addressof(batch), k.shape[1],
        )  # fmt: skip

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: Batch,
        *,
        window: int | None,
        scaling: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """q [T, heads, head_dim] -> the same shape; sinks float32 [heads]."""
        out = q.new_empty(q.shape)
        self.attention_function(
            q.data_ptr(), q.stride(0), q.stride(1), k_cache.data_ptr(), v_cache.data_ptr(), ctypes.addressof(batch),
            k_cache.shape[1], window or EVERYTHING, scaling, softcap or 0.0,
            None if sinks is None else sinks.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out


@functools.cache
def attention(dtype: torch.dtype, head_dim: int, group: int, page_size: int) -> Attention:
    """Raises CompileError."""
    return Attention(dtype, head_dim, group, page_size)
