"""Log-probabilities to report: the log-softmax of the model's logits as they are, before any processing."""

from collections.abc import Callable

import torch

from simple_flashinfer.types import TokenLogprobs


def gather_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: list[int]) -> Callable[[], list[TokenLogprobs]]:
    """logits [N, V], any float dtype; token_ids int64 [N], those that were drawn, or that follow; num_top: how many of the
    likeliest to report for each. Call what it returns once the device is done.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    # what could not be drawn is an error elsewhere
    chosen = logprobs.gather(1, token_ids[:, None].to(logprobs.device).clamp_min(0))
    ranks = (logprobs > chosen).sum(-1) + 1
    top = logprobs.topk(min(max(num_top), logits.shape[-1]), dim=-1)
    columns = [c.to("cpu", non_blocking=True) for c in (token_ids, chosen[:, 0], ranks, top.indices, top.values)]
    return lambda: [
        TokenLogprobs(token, logprob, rank, tuple(zip(ids[:count], values[:count], strict=True)))
        for token, logprob, rank, ids, values, count in zip(*(c.tolist() for c in columns), num_top, strict=True)
    ]
