"""Makes a loaded model faster without touching its forward code: fewer matmuls, over weights that are laid out for speed.

Projections of one input are joined into one matmul: q, k and v; gate and up. The module that is called first computes all of
them and keeps the others' parts; a part is handed out only for that very input, and computed again for any other.

On the CPU the weights are also packed once, for kernels that are as fast as memory at one row and as oneDNN at many: 106M
bfloat16 weights on one core at 1 / 8 / 32 / 256 rows in 8.1 / 13.7 / 35 / 287 ms, oneDNN's own packed ones in 15.2 / 17 / 39
/ 278. Packing replaces the weights; only a matrix that is the token embedding as well (tied) is there twice afterwards.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import linear

_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Packed(Protocol):
    """x -> x W^T + bias, the weights laid out for it."""

    tensors: tuple[torch.Tensor, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


# weight [out, in], bias [out]; None where that weight is better left as it is
Pack = Callable[[torch.Tensor, torch.Tensor | None], Packed | None]


class FusedLinear(nn.Module):
    """One or several linear layers of the same input, as one matmul."""

    def __init__(self, layers: Sequence[nn.Linear], pack: Pack | None = None) -> None:
        super().__init__()
        weights = [layer.weight.detach() for layer in layers]
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        bias = torch.cat(biases) if biases else None
        self.in_features = layers[0].in_features
        self.sizes = [layer.out_features for layer in layers]
        self.out_features = sum(self.sizes)
        self._last = len(layers) - 1
        self.packed = packed = pack(weight, bias) if pack else None
        self.weights = packed.tensors if packed else (weight,)  # for those who count them
        self._matmul: Callable[[torch.Tensor], torch.Tensor] = packed or (lambda x: linear(x, weight, bias))
        # the last input and its parts; in a list, since setting an attribute of a module takes microseconds
        self._kept: list[Any] = [None, []]

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out_features]"""
        return self._matmul(x)

    def part(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """[..., in] -> [..., sizes[index]]"""
        kept = self._kept
        if x is not kept[0]:
            kept[:] = x, torch.split(self._matmul(x), self.sizes, -1)
        part: torch.Tensor = kept[1][index]
        if index == self._last:  # to ask: what is kept is not needed any more
            kept[:] = None, []
        return part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x, 0) if self._last else self._matmul(x)


class FusedPart(nn.Module):
    """Stands where a layer was whose matmul another module does along with its own."""

    def __init__(self, fused: FusedLinear, index: int) -> None:
        super().__init__()
        self._fused = [fused]  # in a list: its weights are registered in one place only
        self._index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._fused[0].part(x, self._index)


def fuse(model: nn.Module, pack: Pack | None = None) -> None:
    """Replaces linear layers inside the model, in place. It computes the same as before, up to the order of sums.

    pack: how weights are laid out for a matmul; None leaves them as they are.
    """
    # the list must not hold the layers that are replaced: their weights go as the packed ones come
    for parent in [module for module in model.modules() if type(module) is not nn.Linear]:
        for names in _JOINED:
            layers: list[Any] = [getattr(parent, name, None) for name in names]
            if _can_join(layers):
                fused = FusedLinear(layers, pack)
                del layers
                setattr(parent, names[0], fused)
                for index, name in enumerate(names[1:], 1):
                    setattr(parent, name, FusedPart(fused, index))
        for name, layer in list(parent.named_children()):
            if pack and type(layer) is nn.Linear:
                setattr(parent, name, FusedLinear([layer], pack))
    if pack:
        for parameter in model.parameters():
            # weights are read where the checkpoint's file is mapped: with the last of them copied the map can be closed
            parameter.data = parameter.data.clone()


def _can_join(layers: Sequence[Any]) -> bool:
    if not all(type(layer) is nn.Linear for layer in layers):  # a subclass may do something else (quantized, LoRA)
        return False
    return len({(layer.in_features, layer.bias is None, layer.weight.dtype) for layer in layers}) == 1
