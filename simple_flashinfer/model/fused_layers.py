"""The small layers between matmuls, each as one kernel instead of a chain of operators: norms, rotary embedding, gated MLPs.

Which layers of a model those are is found by what they are called and settled by trying: the replacement takes the layer's
place only if both give the same for random input. On two cores, one row of 576 bfloat16: norm 2.7 us instead of 17, rotary
embedding of 12 heads 3 instead of 14, gate of 1,536 3.4 instead of 7. On CUDA FlashInfer's kernels do the same
(kernels/cuda.py). Whole layers are then put together from these parts (fused_decoder.py).
"""

import logging
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, Protocol

import torch
from torch import nn

from simple_flashinfer.model.fuse import FusedLinear, FusedPart

logger = logging.getLogger(__name__)

_ROPE = "apply_rotary_pos_emb"  # transformers' name for it, in the file of each model
_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


class LayerKernels(Protocol):
    """Kernels of one device and dtype; shapes as in kernels/cpu.py."""

    rope_needs_equal_halves: bool  # of cos and sin: a kernel may read the first ones only

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...

    def silu_and_mul(self, x: torch.Tensor) -> torch.Tensor: ...

    def rope(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class FusedRMSNorm(nn.Module):
    def __init__(self, norm: nn.Module, kernels: LayerKernels) -> None:
        super().__init__()
        self.weight: Any = norm.weight
        self.eps = float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)  # type: ignore[arg-type]
        self._rms_norm = kernels.rms_norm
        self._original = [norm]  # in a list: its weight is registered in one place only

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        return self._rms_norm(x, weight, self.eps) if x.dtype == weight.dtype else self._original[0](x)


class FusedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one matmul."""

    def __init__(self, mlp: Any, kernels: LayerKernels) -> None:
        super().__init__()
        self.gate_up_proj: FusedLinear = mlp.gate_proj
        self.down_proj = mlp.down_proj
        self._multiply = self.gate_up_proj.multiply
        self._silu_and_mul = kernels.silu_and_mul

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self._silu_and_mul(self._multiply(x)))  # type: ignore[no-any-return]


class RotaryTable(nn.Module):
    """cos and sin of all positions, worked out once."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("cos", cos, persistent=False)  # [positions, dim]
        self.register_buffer("sin", sin, persistent=False)
        self.tables = cos, sin
        self.has_equal_halves = all(bool(torch.equal(*table.chunk(2, -1))) for table in (cos, sin))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids [1, T] -> cos and sin, each [1, T, dim]"""
        cos, sin = self.tables
        return cos.index_select(0, position_ids[0])[None], sin.index_select(0, position_ids[0])[None]


def fuse_layers(model: nn.Module, dtype: torch.dtype, kernels: LayerKernels, num_positions: int) -> None:
    """Replaces layers inside the model, in place; `fuse` comes first. num_positions: as many as there will be."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        _tabulate_rope(model, dtype, device, num_positions)
        can_turn = not kernels.rope_needs_equal_halves or _has_equal_halves(model)
        for parent in list(model.modules()):
            for name, layer in list(parent.named_children()):
                replacement = _replacement(layer, kernels)
                if replacement is not None and _same(layer, replacement, dtype, device):
                    setattr(parent, name, replacement)
            if can_turn:
                _fuse_rope(parent, dtype, device, kernels)
    _shorten(model)


def _shorten(model: nn.Module) -> None:
    """Where a layer looks up one of these modules it finds its forward: calling a module takes microseconds, for hooks that
    these have none of.
    """
    for parent in model.modules():
        if parent is not model:  # others ask that one for its output matrix
            for name, module in parent.named_children():
                if isinstance(module, (FusedLinear, FusedPart, FusedRMSNorm, FusedMLP, RotaryTable)):
                    parent.__dict__[name] = module.forward


def _tabulate_rope(model: nn.Module, dtype: torch.dtype, device: torch.device, num_positions: int) -> None:
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name != "rotary_emb":
                continue
            x = torch.zeros(1, 1, dtype=dtype, device=device)
            try:
                cos, sin = layer(x, torch.arange(num_positions, device=device)[None])
            except (TypeError, RuntimeError):  # it wants other arguments
                continue
            table = RotaryTable(cos[0], sin[0])
            some = _random(torch.float32, device, 1, 7).mul(1e6).long() % num_positions
            # the same for a few positions alone as among all, or they depend on each other (dynamic scaling)
            if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(layer(x, some), table(x, some), strict=True)):
                setattr(parent, name, table)


def _has_equal_halves(model: nn.Module) -> bool:
    """Whether all cos and sin of the model are known, and have equal halves."""
    tables = [layer for name, layer in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"]
    return all(isinstance(table, RotaryTable) and table.has_equal_halves for table in tables)


def _replacement(layer: Any, kernels: LayerKernels) -> nn.Module | None:
    if type(layer).__name__.endswith("RMSNorm") and [name for name, _ in layer.named_parameters()] == ["weight"]:
        return FusedRMSNorm(layer, kernels) if hasattr(layer, "variance_epsilon") or hasattr(layer, "eps") else None
    children = dict(layer.named_children())
    if children.keys() == {"gate_proj", "up_proj", "down_proj", "act_fn"} and isinstance(layer.gate_proj, FusedLinear):
        return FusedMLP(layer, kernels) if len(layer.gate_proj.sizes) == 2 else None
    return None


def _same(layer: nn.Module, replacement: Any, dtype: torch.dtype, device: torch.device) -> bool:
    if not isinstance(replacement, FusedRMSNorm):
        inputs = [_random(dtype, device, 1, 3, replacement.gate_up_proj.in_features)]
    else:  # of whole rows, and of some heads among those of a wider matrix
        width = replacement.weight.shape[0]
        inputs = [_random(dtype, device, 1, 3, width), _random(dtype, device, 1, 3, 5, width)[:, :, 1:4]]
    return all(_close(layer(x), replacement(x)) for x in inputs)


def _fuse_rope(layer: nn.Module, dtype: torch.dtype, device: torch.device, kernels: LayerKernels) -> None:
    """Gives the layer's forward another rotary embedding: the same code, with one name in it meaning another function."""
    forward: Any = type(layer).forward
    if not isinstance(forward, FunctionType) or _ROPE not in forward.__code__.co_names:
        return
    original: Callable[..., tuple[torch.Tensor, torch.Tensor]] = forward.__globals__.get(_ROPE)  # type: ignore[assignment]
    dim = getattr(layer, "head_dim", None)
    if original is None or not isinstance(dim, int):
        return

    def fused(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if args or options or not _fits(q, k, cos, sin):
            return original(q, k, cos, sin, *args, **options)
        return kernels.rope(q, k, cos, sin)

    q, k, (cos, sin) = (_random(dtype, device, *shape) for shape in ((1, 4, 3, dim), (1, 2, 3, dim), (2, 1, 3, dim)))
    if kernels.rope_needs_equal_halves:
        cos, sin = (torch.cat([x[..., : dim // 2]] * 2, -1) for x in (cos, sin))
    try:
        expected, got = original(q, k, cos, sin), fused(q, k, cos, sin)
    except (TypeError, RuntimeError):  # it wants other arguments, or only a part of the head turns, or has another size
        return
    if all(_close(a, b) for a, b in zip(expected, got, strict=True)):
        scope = {**forward.__globals__, _ROPE: fused}
        copy = FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
        copy.__kwdefaults__ = forward.__kwdefaults__
        layer.forward = MethodType(copy, layer)


def _fits(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """The kernel gets pointers: one dtype, whole heads, and no gaps where it expects none."""
    same = q.dtype == k.dtype == cos.dtype == sin.dtype and q.shape[-1] == cos.shape[-1]
    return same and q.stride(-1) == k.stride(-1) == 1 and cos.is_contiguous() and sin.is_contiguous()


def _random(dtype: torch.dtype, device: torch.device, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)  # not the global one: others count on it
    return torch.randn(*shape, generator=generator).to(device, dtype)


def _close(expected: torch.Tensor, got: torch.Tensor) -> bool:
    tolerance = _TOLERANCE[expected.dtype]
    return expected.shape == got.shape and torch.allclose(
        expected, got, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )
