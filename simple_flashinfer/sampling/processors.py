"""What one request asks to be done to its logits, before a token is drawn: for the few rows that ask.

Repetition (HF, from Keskar et al., 2019) looks at prompt and output; presence and frequency (OpenAI) at the output alone.
Counts are taken from the request's tokens at each step: no state that preemption or a retried step could put wrong.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from simple_flashinfer.kernels.transfer import indices, to_device
from simple_flashinfer.types import EngineRequest, Int32Array


@dataclass(slots=True)
class LogitsProcessors:
    """Everything that one request asks for, in the order in which it is applied."""

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)
    allowed: tuple[int, ...] = ()
    banned: tuple[tuple[int, ...], ...] = ()  # token sequences whose last token must not follow the others
    min_tokens: int = 0
    ending: tuple[int, ...] = ()  # banned until there are min_tokens, or nothing else is left, as after a grammar's end

    @classmethod
    def of(cls, request: EngineRequest) -> "LogitsProcessors | None":
        """None when the request asks for nothing of all this."""
        params = request.params
        made = cls(
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            bias=dict(params.logit_bias),
            allowed=params.allowed_token_ids,
            banned=request.bad_token_ids,
            min_tokens=params.min_tokens if request.stop_token_ids else 0,
            ending=request.stop_token_ids if params.min_tokens else (),
        )
        return None if made == cls() else made

    def apply(self, scores: torch.Tensor, token_ids: Int32Array, num_prompt_tokens: int) -> None:
        """Changes scores, float32 [V]. token_ids: the prompt's num_prompt_tokens, then the output's."""
        output, device = token_ids[num_prompt_tokens:], scores.device
        if self.repetition != 1:
            seen = indices(np.unique(token_ids), device)
            value = scores[seen]
            scores[seen] = torch.where(value < 0, value * self.repetition, value / self.repetition)
        if (self.presence or self.frequency) and len(output):
            tokens, counts = np.unique(output, return_counts=True)
            scores[indices(tokens, device)] -= self.presence + self.frequency * indices(counts, device)
        if self.bias:
            values = to_device(np.array(list(self.bias.values()), np.float32), device)
            scores[indices(np.array(list(self.bias)), device)] += values
        if self.allowed:
            index = indices(np.array(self.allowed), device)
            kept = scores[index]
            scores.fill_(-torch.inf)
            scores[index] = kept
        last = output[-max((len(words) for words in self.banned), default=1) :].tolist()
        forbidden = [words[-1] for words in self.banned if len(words) == 1 or last[-len(words) + 1 :] == list(words[:-1])]
        if forbidden:
            scores[indices(np.array(forbidden), device)] = -torch.inf
        if len(output) < self.min_tokens:
            going_on = scores.index_fill(0, indices(np.array(self.ending), device), -torch.inf)
            scores.copy_(torch.where(going_on.isfinite().any(), going_on, scores))


@dataclass(frozen=True, slots=True)
class ProcessedRow:
    """index: the row of the logits; token_ids: int32, the prompt's num_prompt_tokens and then the output's."""

    index: int
    token_ids: Int32Array
    num_prompt_tokens: int
    processors: LogitsProcessors


def apply_processors(logits: torch.Tensor, rows: list[ProcessedRow]) -> torch.Tensor:
    """float32 [S, V] -> a new tensor of that shape."""
    logits = logits.clone()
    for row in rows:
        row.processors.apply(logits[row.index], row.token_ids, row.num_prompt_tokens)
    return logits
