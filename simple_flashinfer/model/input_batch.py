"""From the rows of a step to the arrays that model and sampler take.

Sampling parameters are kept one array each with a place for every row, so that a step's parameters are one indexing
operation, however many requests it has.
"""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from simple_flashinfer.sampling import SamplingBatch
from simple_flashinfer.sampling.grammar import GrammarState
from simple_flashinfer.sampling.processors import LogitsProcessors, ProcessedRow
from simple_flashinfer.types import EngineRequest, Int32Array, SchedulerOutput

T = TypeVar("T")
_PER_ROW = {
    "temperature": np.float32, "top_k": np.int32, "top_p": np.float64, "min_p": np.float32, "typical_p": np.float32,
    "seeds": np.uint64,
}  # fmt: skip


class InputBatch:
    def __init__(self, max_num_seqs: int) -> None:
        self._columns = {name: np.zeros(max_num_seqs, dtype) for name, dtype in _PER_ROW.items()}
        self._processors: dict[int, LogitsProcessors] = {}
        self._num_logprobs: dict[int, int] = {}  # by row, for those that asked
        self._num_prompt_logprobs: dict[int, int] = {}
        self._grammars: dict[int, GrammarState] = {}
        self.request_ids: dict[int, str] = {}  # by row

    def start(self, new_requests: list[tuple[int, EngineRequest]], start_grammar: Callable[[str], GrammarState]) -> None:
        """Rows that have another request than before."""
        for row, request in new_requests:
            params = request.params
            values = {
                "temperature": params.temperature,
                "top_k": max(params.top_k, 0),
                "top_p": params.top_p,
                "min_p": params.min_p,
                "typical_p": params.typical_p,
                "seeds": request.seed % 2**64,
            }
            for name, value in values.items():
                self._columns[name][row] = value
            _set(self._processors, row, LogitsProcessors.of(request))
            _set(self._grammars, row, start_grammar(params.grammar) if params.grammar else None)
            self.request_ids[row] = request.request_id
            _set(self._num_logprobs, row, params.logprobs)
            _set(self._num_prompt_logprobs, row, params.prompt_logprobs)

    def sampling(self, batch: SchedulerOutput) -> SamplingBatch:
        rows = batch.rows[batch.samples]
        table = batch.table
        return SamplingBatch(
            **{name: column[rows] for name, column in self._columns.items()},
            positions=table.num_tokens[rows].astype(np.int64),
            processed=[
                ProcessedRow(
                    index=index,
                    token_ids=table.token_ids[row, : table.num_tokens[row]],
                    num_prompt_tokens=int(table.num_prompt_tokens[row]),
                    processors=processors,
                )
                for index, row in enumerate(rows.tolist())
                if (processors := self._processors.get(row)) is not None
            ]
            if self._processors
            else [],
        )

    def grammars(self, batch: SchedulerOutput) -> dict[int, tuple[GrammarState, Int32Array]]:
        """State and output so far, by index into the sampled rows that have a grammar."""
        if not self._grammars:
            return {}
        table, rows = batch.table, batch.rows[batch.samples].tolist()
        return {
            index: (self._grammars[row], table.token_ids[row, table.num_prompt_tokens[row] : table.num_tokens[row]])
            for index, row in enumerate(rows)
            if row in self._grammars
        }

    def num_logprobs(self, batch: SchedulerOutput) -> dict[int, int]:
        """How many of the likeliest tokens to report, by index into the sampled rows that asked."""
        if not self._num_logprobs:
            return {}
        rows = batch.rows[batch.samples].tolist()
        return {index: self._num_logprobs[row] for index, row in enumerate(rows) if row in self._num_logprobs}

    def prompt_logprobs(self, batch: SchedulerOutput) -> list[tuple[int, int, int, int]]:
        """For those that asked: row, index of its first token in the step's flat tokens, how many of its tokens are followed
        by one of the prompt, how many of the likeliest to report.
        """
        if not self._num_prompt_logprobs:
            return []
        starts = np.cumsum(batch.num_scheduled_tokens) - batch.num_scheduled_tokens
        last = batch.table.num_prompt_tokens[batch.rows] - 1 - batch.num_computed_tokens
        counts = np.clip(last, 0, batch.num_scheduled_tokens)
        return [
            (row, start, count, self._num_prompt_logprobs[row])
            for row, start, count in zip(batch.rows.tolist(), starts.tolist(), counts.tolist(), strict=True)
            if count and row in self._num_prompt_logprobs
        ]


def _set(by_row: dict[int, T], row: int, value: T | None) -> None:
    if value is None:
        by_row.pop(row, None)
    else:
        by_row[row] = value


def token_ids(batch: SchedulerOutput, batch_indices: Int32Array, positions: Int32Array) -> Int32Array:
    """The tokens to compute, int32 [T]."""
    return batch.table.token_ids[batch.rows[batch_indices], positions]


def device_tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """int64 on the device, as embeddings and indexing want it."""
    return torch.from_numpy(array.astype(np.int64)).to(device, non_blocking=True)
