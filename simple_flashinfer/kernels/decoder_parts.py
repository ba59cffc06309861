"""What a decoder layer is made of, for kernels that compute whole layers."""

from dataclasses import dataclass
from typing import Protocol

import torch


class Norm(Protocol):
    weight: torch.Tensor
    eps: float


class Matmul(Protocol):
    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """[..., in] -> [..., out]"""


@dataclass(frozen=True, slots=True)
class DecoderParts:
    """norm -> q, k and v -> norms of q and k, of a head or of all -> attention -> o; norm -> gate and up -> down."""

    input_norm: Norm
    qkv: Matmul
    q_norm: Norm | None
    k_norm: Norm | None
    o: Matmul
    post_norm: Norm
    gate_up: Matmul
    down: Matmul

    @property
    def matmuls(self) -> tuple[Matmul, ...]:
        return self.qkv, self.o, self.gate_up, self.down
