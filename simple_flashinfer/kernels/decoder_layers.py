"""Whole decoder layers as one call on the CPU: decoder_layers.cpp over the kernels of kernels/cpu.py."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from simple_flashinfer.kernels.cpu import EVERYTHING, Attention, Batch, CpuKernels, Linear
from simple_flashinfer.kernels.decoder_parts import DecoderParts, Matmul, Norm

_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Linear(ctypes.Structure):
    _fields_ = (
        ("multiply", _pointer), ("weight", _pointer), ("scales", _pointer), ("bias", _pointer), ("inputs", _int),
        ("outputs", _int),
    )  # fmt: skip

    @classmethod
    def of(cls, linear: Matmul) -> "_Linear":
        assert isinstance(linear, Linear)  # packed: its backend looked
        return cls(_address(linear.multiply), *linear.pointers, linear.in_features, linear.out_features)


class _Norm(ctypes.Structure):
    _fields_ = (("weight", _pointer), ("dim", _int), ("eps", _float))

    @classmethod
    def of(cls, norm: Norm | None) -> "_Norm":
        return cls(norm.weight.data_ptr(), norm.weight.numel(), norm.eps) if norm else cls()


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _pointer) for name in ("rms_norm", "silu_and_mul", "rope", "append", "attention")),
        *((name, _Norm) for name in ("input_norm", "q_norm", "k_norm", "post_norm")),
        *((name, _Linear) for name in ("qkv", "o", "gate_up", "down")),
        *((name, _pointer) for name in ("k_cache", "v_cache")),
        *((name, _int) for name in ("heads", "kv_heads", "head_dim", "window")),
        ("scaling", _float),
        ("softcap", _float),
    )


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """parts: of packed matmuls. k_cache, v_cache [num_pages, kv_heads, page_size, head_dim]; window, softcap: or None."""

    parts: DecoderParts
    attention: Attention
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    num_qo_heads: int
    window: int | None
    scaling: float
    softcap: float | None

    def described(self, kernels: CpuKernels) -> _Layer:
        _, kv_heads, _, head_dim = self.k_cache.shape
        parts, attention = self.parts, self.attention
        functions = (
            kernels.rms_norm_function, kernels.silu_and_mul_function, kernels.rope_function, attention.append_function,
            attention.attention_function,
        )  # fmt: skip
        return _Layer(
            *map(_address, functions),
            *map(_Norm.of, (parts.input_norm, parts.q_norm, parts.k_norm, parts.post_norm)),
            *map(_Linear.of, parts.matmuls),
            self.k_cache.data_ptr(), self.v_cache.data_ptr(), self.num_qo_heads, kv_heads, head_dim,
            self.window or EVERYTHING, self.scaling, self.softcap or 0.0,
        )  # fmt: skip


class DecoderLayers:
    """Layers that follow each other, of one hidden size and one head size."""

    def __init__(self, layers: Sequence[DecoderLayer], kernels: CpuKernels) -> None:
        self._layers = (_Layer * len(layers))(*(layer.described(kernels) for layer in layers))
        self._held = layers  # pointers keep nothing alive
        (self._hidden,) = {layer.parts.input_norm.weight.numel() for layer in layers}
        (self._head_dim,) = {layer.k_cache.shape[-1] for layer in layers}
        self._dtype = kernels.dtype
        self._run = kernels.decoder_layers_function

    def __call__(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: Batch) -> torch.Tensor:
        """x [1, T, hidden], cos and sin [1, T, head_dim] -> [1, T, hidden]. Raises TypeError or ValueError."""
        if not x.dtype == cos.dtype == sin.dtype == self._dtype:
            raise TypeError(f"the input of these layers is {x.dtype}, their weights were {self._dtype}")
        tokens = batch.tokens
        if x.shape != (1, tokens, self._hidden) or not cos.shape == sin.shape == (1, tokens, self._head_dim):
            raise ValueError(
                f"the planned step has {tokens} tokens, these are {tuple(x.shape)}, turned by {tuple(cos.shape)}"
            )
        x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
        out = torch.empty_like(x)
        self._run(
            ctypes.addressof(self._layers), len(self._layers), ctypes.addressof(batch),
            cos.data_ptr(), sin.data_ptr(), x.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out


def _address(function: Any) -> int | None:
    return ctypes.cast(function, _pointer).value
