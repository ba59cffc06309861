"""Attention written out in torch: scores, cap, mask, softmax, values. The reference that everything else is held to."""

import torch

_MAX_SCORES = 1 << 25  # scores in memory at a time: longer chunks of queries are computed in parts


def causal_mask(q_positions: torch.Tensor, kv_positions: torch.Tensor, sliding_window: int | None) -> torch.Tensor:
    """bool [..., Q, K], True where a query may look. Positions are [..., Q] and [..., K]."""
    distance = q_positions[..., :, None] - kv_positions[..., None, :]
    mask = distance >= 0
    return mask if sliding_window is None else mask & (distance < sliding_window)


def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Grouped-query attention, softmax in float32.

    q [B, Hkv, G, Q, D]: the G query heads that share a K/V head stand together; k [B, Hkv, K, D], v [B, Hkv, K, Dv];
    mask bool, broadcastable to [B, Q, K]; sinks [Hkv * G]. Returns [B, Hkv, G, Q, Dv] in q's dtype.
    """
    batch, kv_heads, group, num_q, _ = q.shape
    step = max(1, _MAX_SCORES // (batch * kv_heads * group * k.shape[2]))
    if num_q > step:
        parts = [
            grouped_attention(
                q[:, :, :, i : i + step], k, v, mask if mask is None else mask[:, i : i + step], scaling, softcap, sinks
            )
            for i in range(0, num_q, step)
        ]
        return torch.cat(parts, dim=3)
    folded = (q * scaling).reshape(batch * kv_heads, group * num_q, -1)
    scores = torch.bmm(folded, k.flatten(0, 1).transpose(1, 2)).view(batch, kv_heads, group, num_q, -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, kv_heads, group, 1, 1).expand(batch, -1, -1, num_q, 1)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    weights = weights.to(v.dtype).reshape(batch * kv_heads, group * num_q, -1)
    return torch.bmm(weights, v.flatten(0, 1)).view(batch, kv_heads, group, num_q, -1)
