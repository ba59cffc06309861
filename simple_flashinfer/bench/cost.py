"""What a step must do at least, whatever the code: bytes to read and write, multiplications to make.

Bytes: every weight once, the K/V of earlier tokens read (once where requests share it), that of new tokens written. Of an
embedding table only the rows of the step's tokens are read; a table that is the output matrix too (tied) counts whole, once.
The output matrix is needed by steps that draw tokens only. Of a mixture of experts, n tokens are taken to need the share
1 - (1 - k/E)^n of the expert weights: k of E for each token, evenly spread. Activations, logits and sampling are left out:
they need not leave the caches.

FLOPs: 2 for each weight of a matrix and token (of experts the share k/E), for the output matrix and drawn token, and 2 x
heads x (head_dim of K + of V) for each pair of a token and one that it attends to.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from simple_flashinfer.attention import AttentionLayer
from simple_flashinfer.model.fuse import FusedLinear
from simple_flashinfer.types import Int32Array, SchedulerOutput


@dataclass(slots=True)
class Cost:
    bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


class CostModel:
    def __init__(self, model: nn.Module, layers: Sequence[AttentionLayer], kv_dtype: torch.dtype) -> None:
        """The weights are counted as they are kept: joined, packed or quantized ones too."""
        config = model.config.get_text_config()  # type: ignore[operator, union-attr]
        head = model.get_output_embeddings()  # type: ignore[operator]
        self.layers = Counter(replace(layer, layer_idx=0) for layer in layers)  # how many there are of a kind
        self.kv_dtype = kv_dtype
        self.body, self.experts, self.head = Cost(), Cost(), Cost()  # flops: a token's, an expert token's, a drawn token's
        self.embedding_bytes_per_token = 0
        self._expert_share = _expert_share(config)
        of_head = {id(weight) for weight in (_weights(head) if head is not None else ())}
        seen: set[int] = set()
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                if id(module.weight) not in of_head:
                    self.embedding_bytes_per_token += module.weight[0].nbytes
                continue
            for weight in _weights(module):
                if id(weight) not in seen:
                    seen.add(id(weight))
                    part = self.head if module is head else self.experts if "experts" in name.split(".") else self.body
                    part.bytes += weight.nbytes
                    part.flops += 2 * weight.numel() * (weight.dim() > 1)

    def describe(self) -> dict[str, float]:
        """weight_bytes: what a step reads that draws tokens, with all experts; flops: 2 for each weight of a matrix."""
        parts = self.body + self.experts + self.head
        return {
            "weight_bytes": parts.bytes,
            "flops_per_token": self.body.flops + self.experts.flops * self._expert_share,
            "flops_per_drawn_token": self.head.flops,
            "kv_bytes_per_token": sum(count * layer.bytes_per_token(self.kv_dtype) for layer, count in self.layers.items()),
        }

    def step(self, batch: SchedulerOutput, num_shared_tokens: int = 0) -> Cost:
        """Of one step with this batch. num_shared_tokens: at the start of all its requests, with the same K/V."""
        before, after = batch.num_computed_tokens, batch.num_computed_tokens + batch.num_scheduled_tokens
        tokens, drawn = int(batch.num_scheduled_tokens.sum()), int(batch.samples.sum())
        read = 1 - (1 - self._expert_share) ** tokens
        cost = Cost(
            self.body.bytes
            + self.experts.bytes * read
            + self.head.bytes * (drawn > 0)
            + self.embedding_bytes_per_token * tokens,
            (self.body.flops + self.experts.flops * self._expert_share) * tokens + self.head.flops * drawn,
        )
        shared = np.minimum(before, num_shared_tokens)
        again = int(shared.sum() - shared.max())
        for layer, count in self.layers.items():
            window = layer.sliding_window  # in which each request sees other parts of what is shared
            earlier = int(before.sum()) - again if window is None else int(np.minimum(before, window - 1).sum())
            pairs = int((_pairs(after, window) - _pairs(before, window)).sum())
            cost.bytes += count * (earlier + tokens) * layer.bytes_per_token(self.kv_dtype)
            cost.flops += count * 2 * layer.num_qo_heads * (layer.head_dim_qk + layer.head_dim_vo) * pairs
        return cost


def _weights(module: nn.Module) -> Iterator[torch.Tensor]:
    """A module's own: parameters, buffers that checkpoints have, and what replaced parameters (packed ones)."""
    yield from module.parameters(recurse=False)
    transient = module._non_persistent_buffers_set
    yield from (buffer for name, buffer in module.named_buffers(recurse=False) if name not in transient)
    if isinstance(module, FusedLinear):
        yield from module.weights


def _expert_share(config: object) -> float:
    """k/E; 1 for a model whose config names no experts."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((value for name in names if (value := getattr(config, name, None))), None)
    per_token = getattr(config, "num_experts_per_tok", None)
    return per_token / count if count and per_token else 1.0


def _pairs(length: Int32Array, window: int | None) -> np.ndarray:
    """How many (token, token that it attends to) there are in the first `length` tokens, for each request."""
    whole = length.astype(np.int64)
    inside = whole if window is None else np.minimum(whole, window)
    return inside * (inside + 1) // 2 + (whole - inside) * (window or 0)
