"""From the rows of a step to the arrays that model and sampler take.

Sampling parameters are kept one array each with a place for every row, so that a step's parameters are one indexing
operation, however many requests it has.
"""

import numpy as np
import torch

from simple_flashinfer.sampling import SamplingBatch
from simple_flashinfer.sampling.penalties import PenalisedRow
from simple_flashinfer.types import EngineRequest, Int32Array, SamplingParams, SchedulerOutput

_PER_ROW = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float64, "min_p": np.float32, "seeds": np.uint64}


class InputBatch:
    def __init__(self, max_num_seqs: int) -> None:
        self._columns = {name: np.zeros(max_num_seqs, dtype) for name, dtype in _PER_ROW.items()}
        self._penalised: dict[int, SamplingParams] = {}

    def start(self, new_requests: list[tuple[int, EngineRequest]]) -> None:
        """Rows that have another request than before."""
        for row, request in new_requests:
            params = request.params
            values = {
                "temperature": params.temperature,
                "top_k": max(params.top_k, 0),
                "top_p": params.top_p,
                "min_p": params.min_p,
                "seeds": request.seed % 2**64,
            }
            for name, value in values.items():
                self._columns[name][row] = value
            if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
                self._penalised[row] = params
            else:
                self._penalised.pop(row, None)

    def sampling(self, batch: SchedulerOutput) -> SamplingBatch:
        rows = batch.rows[batch.samples]
        table = batch.table
        return SamplingBatch(
            **{name: column[rows] for name, column in self._columns.items()},
            positions=table.num_tokens[rows].astype(np.int64),
            penalised=[
                PenalisedRow(
                    index=index,
                    token_ids=table.token_ids[row, : table.num_tokens[row]],
                    num_prompt_tokens=int(table.num_prompt_tokens[row]),
                    repetition=params.repetition_penalty,
                    presence=params.presence_penalty,
                    frequency=params.frequency_penalty,
                )
                for index, row in enumerate(rows.tolist())
                if (params := self._penalised.get(row)) is not None
            ]
            if self._penalised
            else [],
        )


def token_ids(batch: SchedulerOutput, batch_indices: Int32Array, positions: Int32Array) -> Int32Array:
    """The tokens to compute, int32 [T]."""
    return batch.table.token_ids[batch.rows[batch_indices], positions]


def device_tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """int64 on the device, as embeddings and indexing want it."""
    return torch.from_numpy(array.astype(np.int64)).to(device, non_blocking=True)
