"""Penalties on tokens that were there before.

Repetition (HF, from Keskar et al., 2019) looks at prompt and output; presence and frequency (OpenAI) at the output alone.
Counts are taken from the request's tokens at each step: no state that preemption or a retried step could put wrong.
"""

from dataclasses import dataclass

import numpy as np
import torch

from simple_flashinfer.types import Int32Array


@dataclass(frozen=True, slots=True)
class PenalisedRow:
    """index: the row of the logits; token_ids: int32, the prompt's num_prompt_tokens and then the output's."""

    index: int
    token_ids: Int32Array
    num_prompt_tokens: int
    repetition: float
    presence: float
    frequency: float


def apply_penalties(logits: torch.Tensor, rows: list[PenalisedRow]) -> torch.Tensor:
    """float32 [S, V] -> a new tensor of that shape."""
    logits = logits.clone()
    for row in rows:
        scores = logits[row.index]
        if row.repetition != 1:
            seen = _tensor(np.unique(row.token_ids), logits)
            value = scores[seen]
            scores[seen] = torch.where(value < 0, value * row.repetition, value / row.repetition)
        if row.presence or row.frequency:
            tokens, counts = np.unique(row.token_ids[row.num_prompt_tokens :], return_counts=True)
            scores[_tensor(tokens, logits)] -= row.presence + row.frequency * _tensor(counts, logits)
    return logits


def _tensor(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64)).to(like.device)
