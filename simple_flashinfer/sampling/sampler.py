"""Draws one token from each row of logits.

A draw depends on the request's seed and on the token's position only. The uniform number comes from a hash of the two
(splitmix64; Steele, Lea and Flood, 2014), not from a generator with a state, and inverts the cumulative distribution
in vocabulary order. Filters (top-k, top-p, min-p) only compare with a threshold, so that neither the way it was found nor
the order of equal logits changes the result: a request gets the same token alone, in any batch, and when computed again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from simple_flashinfer.kernels.transfer import to_device
from simple_flashinfer.sampling.processors import ProcessedRow, apply_processors

FloatArray = npt.NDArray[np.float32]
# probabilities float32 [D, V], top_k int32 [D], top_p float32 [D], off is V and 1 -> those that are left, others 0; [D, V]
FilterProbs = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# logits [S, V] as the model gives them or float32; temperature, top_k, top_p, min_p and uniform numbers [S], as in
# SamplingBatch -> tokens int64 [S], or INVALID_TOKEN
Draw = Callable[
    [torch.Tensor, FloatArray, npt.NDArray[np.int32], npt.NDArray[np.float64], FloatArray, npt.NDArray[np.float64]],
    torch.Tensor,
]

INVALID_TOKEN = -1  # drawn where the largest logit is not finite, or one is NaN
_BLOCK = 256
_TOP = 1024  # a top-p threshold is first looked for among so many logits; sorting 49,152 of them takes 8 times as long


@dataclass(slots=True)
class SamplingBatch:
    """Parameters of S rows, each [S]. Off is temperature 0 (greedy), top_k 0, top_p 0, min_p 0, typical_p 0."""

    temperature: FloatArray
    top_k: npt.NDArray[np.int32]
    top_p: npt.NDArray[np.float64]
    min_p: FloatArray
    seeds: npt.NDArray[np.uint64]
    positions: npt.NDArray[np.int64]  # of the token to be drawn
    typical_p: FloatArray
    processed: list[ProcessedRow] = field(default_factory=list)

    @classmethod
    def demanding(cls, num_rows: int) -> "SamplingBatch":
        """Rows that ask for all that takes memory, to see how much."""
        half, zeros = np.full(num_rows, 0.5), np.zeros(num_rows)
        return cls(
            temperature=half.astype(np.float32), top_k=np.full(num_rows, 2, np.int32), top_p=half,
            min_p=half.astype(np.float32), seeds=zeros.astype(np.uint64), positions=zeros.astype(np.int64),
            typical_p=zeros.astype(np.float32),
        )  # fmt: skip

    @property
    def is_greedy(self) -> bool:
        """The likeliest tokens of the logits as they are."""
        return not self.processed and not (self.temperature > 0).any()


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """logits [S, V], any float dtype -> int64 [S]; INVALID_TOKEN where the largest is not finite, or one is NaN."""
    best, tokens = logits.max(dim=-1)
    return torch.where(_is_finite(best), tokens, INVALID_TOKEN)


def _is_finite(x: torch.Tensor) -> torch.Tensor:
    """Two kernels, where torch.isfinite takes four: on a GPU a decode step of a small model is a row of short ones."""
    return x.abs() < torch.inf  # false for NaN


def sample(
    logits: torch.Tensor, batch: SamplingBatch, filter_probs: FilterProbs | None = None, draw: Draw | None = None
) -> torch.Tensor:
    """logits [S, V], any float dtype -> int64 [S] on the same device; INVALID_TOKEN where the largest is not finite.

    filter_probs: the device's kernel for top-k and top-p. Without it torch looks for their thresholds, and may have to wait
    for the device to know how far to look. draw: a kernel for all but typical_p. Without it a batch that `is_greedy` is
    served sooner by `likeliest`.
    """
    if batch.processed:
        logits = apply_processors(logits.float(), batch.processed)
    if draw is None:
        return _sample(logits.float(), batch, np.arange(len(logits)), filter_probs)
    numbers = uniforms(batch.seeds, batch.positions)
    tokens = draw(logits, batch.temperature, batch.top_k, batch.top_p, batch.min_p, numbers)
    typical = np.flatnonzero((batch.typical_p > 0) & (batch.typical_p < 1))
    if len(typical):
        rows = to_device(typical, logits.device)
        tokens[rows] = _sample(logits[rows].float(), batch, typical, filter_probs)
    return tokens


def _sample(
    logits: torch.Tensor, batch: SamplingBatch, rows: npt.NDArray[np.intp], filter_probs: FilterProbs | None
) -> torch.Tensor:
    """logits float32 [R, V], those of some rows of the batch."""
    best, tokens = logits.max(dim=-1)
    drawn = np.flatnonzero(batch.temperature[rows] > 0)
    if len(drawn):
        index, rows = to_device(drawn, logits.device), rows[drawn]
        shifted = logits - best[:, None] if len(drawn) == len(logits) else logits[index] - best[index, None]
        shifted /= to_device(batch.temperature[rows], logits.device)[:, None]
        probs = _filtered(shifted, batch, rows, filter_probs)
        typical_p = batch.typical_p[rows]
        for at in np.flatnonzero((typical_p > 0) & (typical_p < 1)).tolist():
            probs[at] = _typical(probs[at], float(typical_p[at]))
        picked = _pick(probs, to_device(uniforms(batch.seeds[rows], batch.positions[rows]), logits.device))
        tokens[index] = picked.clamp_max(logits.shape[-1] - 1)
    return torch.where(_is_finite(best), tokens, INVALID_TOKEN)


def _pick(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token of each row [D, V] at which the cumulative distribution passes uniform [D] times its end.

    First among sums of _BLOCK tokens, then within one block: adding up all of a vocabulary takes 4 times as long.
    """
    rest = -probs.shape[-1] % _BLOCK
    blocks = (torch.nn.functional.pad(probs, (0, rest)) if rest else probs).view(len(probs), -1, _BLOCK)
    cdf = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform[:, None] * cdf[:, -1:]
    # right=True never picks a token of probability 0: its step of the cumulative distribution is flat
    block = torch.searchsorted(cdf, target, right=True).clamp_max(cdf.shape[-1] - 1)
    before = torch.where(block > 0, cdf.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks[torch.arange(len(blocks), device=probs.device), block[:, 0]].cumsum(-1, dtype=torch.float64) + before
    at = torch.searchsorted(inside, target, right=True)
    # sums of blocks and of tokens are rounded apart: what passes the end of a block is its last token that can be drawn
    last = (inside < inside[:, -1:]).sum(-1, keepdim=True)
    return (block * _BLOCK + torch.minimum(at, last))[:, 0]


def uniforms(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position); its last bit is left out, so that it times a sum stays below it."""
    mixed = _splitmix64(seeds ^ _splitmix64(positions.astype(np.uint64)))
    return (mixed >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _filtered(
    logits: torch.Tensor, batch: SamplingBatch, drawn: npt.NDArray[np.intp], filter_probs: FilterProbs | None
) -> torch.Tensor:
    """Probabilities, up to a factor, [D, V]; 0 is what may not be drawn. `logits` have 0 as maximum.

    The order is HF's: top-k, then top-p of what is left, then min-p relative to the best token.
    """
    top_k, top_p, min_p = batch.top_k[drawn], batch.top_p[drawn], batch.min_p[drawn]
    vocab = logits.shape[-1]
    limit = None
    if (min_p > 0).any():
        with np.errstate(divide="ignore"):
            limit = to_device(np.log(min_p), logits.device)
    ranked = np.flatnonzero(((top_k > 0) & (top_k < vocab)) | ((top_p > 0) & (top_p < 1)))
    if len(ranked):
        index = to_device(ranked, logits.device)
        k = to_device(np.where(top_k > 0, np.minimum(top_k, vocab), vocab)[ranked].astype(np.int32), logits.device)
        p = to_device(np.where(top_p > 0, top_p, 1.0)[ranked], logits.device)
        if filter_probs is not None:
            probs = torch.softmax(logits, dim=-1)
            if len(ranked) == len(probs):
                probs = filter_probs(probs, k, p.float())
            else:
                probs[index] = filter_probs(probs[index], k, p.float())
            return probs if limit is None else probs.masked_fill(logits < limit[:, None], 0.0)
        limit = torch.full((len(drawn),), -torch.inf, device=logits.device) if limit is None else limit
        limit[index] = torch.maximum(limit[index], _rank_threshold(logits[index], k, p))
    return torch.softmax(logits if limit is None else logits.masked_fill(logits < limit[:, None], -torch.inf), dim=-1)


def _typical(probs: torch.Tensor, mass: float) -> torch.Tensor:
    """Locally typical sampling (Meister et al., 2022): of [V] probabilities those with information nearest to the entropy.

    They are taken in order until they have `mass`; of equal distances all are taken, so that their order does not matter.
    """
    information = -probs.log()
    distance = (information - torch.special.entr(probs).sum()).abs()  # infinite for what has no probability
    ordered, order = distance.sort(stable=True)
    count = (probs[order].cumsum(-1) < mass).sum().clamp_max(len(probs) - 1)
    kept: torch.Tensor = distance <= ordered.gather(0, count[None])
    return probs * kept


def _rank_threshold(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest logit that top-k and top-p leave in each row, [D]."""
    vocab = logits.shape[-1]
    k, p = top_k[:, None], top_p[:, None]
    log_total = torch.logsumexp(logits, dim=-1, keepdim=True).double()
    width = min(vocab, _TOP)
    while True:
        values = logits.topk(width, dim=-1).values
        inside = torch.arange(width, device=logits.device) < k
        probs = (values.double() - log_total).exp() * inside
        # of a row with top-k inside the width the total is known exactly; of others it is that of the vocabulary
        total = torch.where(k <= width, probs.sum(-1, keepdim=True), 1.0)
        before = probs.cumsum(-1) - probs
        kept = inside & (before < p * total)
        enough = kept[:, -1] & (k[:, 0] > width)  # the set may go on beyond what was looked at
        if width == vocab or not bool(enough.any()):
            return values.gather(1, kept.sum(-1, keepdim=True) - 1)[:, 0]
        width = vocab
