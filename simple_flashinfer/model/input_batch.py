"""From the rows of a step to the arrays that model and sampler take.

Sampling parameters are kept one array each with a place for every row, so that a step's parameters are one indexing
operation, however many requests it has. What `prepare` gives are copies: the step may run while the table goes on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from simple_flashinfer.attention import AttentionMetadata
from simple_flashinfer.sampling import SamplingBatch
from simple_flashinfer.sampling.grammar import GrammarState
from simple_flashinfer.sampling.processors import LogitsProcessors, ProcessedRow
from simple_flashinfer.types import UNKNOWN_TOKEN, EngineRequest, Int32Array, SchedulerOutput

T = TypeVar("T")
_PER_ROW = {
    "temperature": np.float32, "top_k": np.int32, "top_p": np.float64, "min_p": np.float32, "typical_p": np.float32,
    "seeds": np.uint64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Asked for the tokens of a prompt that follow some of this step's.

    Attributes:
        start: index of the first of these in the step's flat tokens.
        targets: int32, the tokens that follow.
        num_top: how many of the likeliest to report with each.
    """

    row: int
    start: int
    targets: Int32Array
    num_top: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step, on the host. S rows are sampled.

    Attributes:
        token_ids: int32 [T], what to compute; UNKNOWN_TOKEN is what was drawn last for that row.
        rows: int32 [R], the row of each request.
        last_tokens: int32 [S], indices into the flat tokens: where to draw.
        sampled_rows: int32 [S].
        sampling: [S]
        grammars: by index into sampled_rows: state, and output so far.
        num_logprobs: by the same index: how many of the likeliest tokens to report.
        request_ids: [S]
    """

    metadata: AttentionMetadata
    token_ids: Int32Array
    rows: Int32Array
    last_tokens: Int32Array
    sampled_rows: Int32Array
    sampling: SamplingBatch
    grammars: dict[int, tuple[GrammarState, Int32Array]]
    num_logprobs: dict[int, int]
    prompt_logprobs: list[PromptLogprobs]
    request_ids: list[str]

    @property
    def only_decodes(self) -> bool:
        return self.metadata.num_decodes == len(self.rows) == len(self.sampled_rows)

    @property
    def has_unknown_tokens(self) -> bool:
        return bool((self.token_ids == UNKNOWN_TOKEN).any())


class InputBatch:
    def __init__(self, max_num_seqs: int, start_grammar: Callable[[str], GrammarState]) -> None:
        self._start_grammar = start_grammar
        self._columns = {name: np.zeros(max_num_seqs, dtype) for name, dtype in _PER_ROW.items()}
        self._processors: dict[int, LogitsProcessors] = {}
        self._num_logprobs: dict[int, int] = {}  # by row, for those that asked
        self._num_prompt_logprobs: dict[int, int] = {}
        self._grammars: dict[int, GrammarState] = {}
        self._request_ids: dict[int, str] = {}  # by row

    def prepare(self, batch: SchedulerOutput) -> StepInputs:
        """Copies out of the live table what this step needs."""
        for row, request in batch.new_requests:
            self._start(row, request)
        table, metadata = batch.table, AttentionMetadata.of(batch)
        rows, ends = batch.rows[batch.samples], batch.ends[batch.samples]
        listed = rows.tolist()
        return StepInputs(
            metadata=metadata,
            token_ids=table.token_ids[batch.rows[metadata.batch_indices], metadata.positions],
            rows=batch.rows,
            last_tokens=metadata.qo_indptr[1:][batch.samples] - 1,
            sampled_rows=rows,
            sampling=SamplingBatch(
                **{name: column[rows] for name, column in self._columns.items()},
                positions=ends.astype(np.int64),
                processed=[
                    ProcessedRow(
                        index=index,
                        token_ids=table.token_ids[row, : ends[index]].copy(),
                        num_prompt_tokens=int(table.num_prompt_tokens[row]),
                        processors=processors,
                    )
                    for index, row in enumerate(listed)
                    if (processors := self._processors.get(row)) is not None
                ]
                if self._processors
                else [],
            ),
            grammars={
                index: (self._grammars[row], table.token_ids[row, table.num_prompt_tokens[row] : ends[index]].copy())
                for index, row in enumerate(listed)
                if row in self._grammars
            }
            if self._grammars
            else {},
            num_logprobs={index: self._num_logprobs[row] for index, row in enumerate(listed) if row in self._num_logprobs}
            if self._num_logprobs
            else {},
            prompt_logprobs=self._asked_of_prompts(batch) if self._num_prompt_logprobs else [],
            request_ids=[self._request_ids[row] for row in listed],
        )

    def _start(self, row: int, request: EngineRequest) -> None:
        """The row has another request than before."""
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
        _set(self._grammars, row, self._start_grammar(params.grammar) if params.grammar else None)
        _set(self._num_logprobs, row, params.logprobs)
        _set(self._num_prompt_logprobs, row, params.prompt_logprobs)
        self._request_ids[row] = request.request_id

    def _asked_of_prompts(self, batch: SchedulerOutput) -> list[PromptLogprobs]:
        table = batch.table
        starts = np.cumsum(batch.num_scheduled_tokens) - batch.num_scheduled_tokens
        last = table.num_prompt_tokens[batch.rows] - 1 - batch.num_computed_tokens
        counts = np.clip(last, 0, batch.num_scheduled_tokens)  # those that are followed by a token of the prompt
        return [
            PromptLogprobs(row, start, table.token_ids[row, computed + 1 : computed + 1 + count].copy(), num_top)
            for row, start, count, computed in zip(
                *(array.tolist() for array in (batch.rows, starts, counts, batch.num_computed_tokens)), strict=True
            )
            if count and (num_top := self._num_prompt_logprobs.get(row)) is not None
        ]


def _set(by_row: dict[int, T], row: int, value: T | None) -> None:
    if value is None:
        by_row.pop(row, None)
    else:
        by_row[row] = value
