"""An executor without a model: it writes tokens into simulated pages, and reads them back as attention would."""

from collections import defaultdict
from concurrent.futures import Future

import numpy as np

from simple_flashinfer.core.engine import EngineCore
from simple_flashinfer.core.scheduler import Scheduler
from simple_flashinfer.types import Add, EngineRequest, FinishReason, ModelOutput, SamplingParams

VOCABULARY = 50
POISON = VOCABULARY  # a prompt with this token makes every step fail that it is in


def next_token(tokens) -> int:
    """The simulated model: depends on every token and on its place."""
    value = 7
    for token in tokens:
        value = (value * 31 + int(token) + 1) % 1_000_003
    return value % VOCABULARY


def expected_output(request: EngineRequest) -> tuple[list[int], FinishReason]:
    tokens = request.prompt_token_ids.tolist()
    output: list[int] = []
    while len(output) < request.max_tokens:
        output.append(next_token(tokens + output))
        if output[-1] in request.stop_token_ids:
            return output, FinishReason.STOP
    return output, FinishReason.LENGTH


class SimulatedExecutor:
    def __init__(self, scheduler: Scheduler) -> None:
        self.max_tokens = scheduler.max_num_batched_tokens
        self.pages = np.full((scheduler.kv.pool.num_pages, scheduler.table.page_size), -1)
        self.batch_sizes: list[int] = []
        self.known: dict[int, str] = {}
        self.shut_down = False

    def execute(self, batch) -> Future:
        future: Future = Future()
        try:
            future.set_result(self._execute(batch))
        except Exception as error:
            future.set_exception(error)
        return future

    def _execute(self, batch) -> ModelOutput:
        table, size = batch.table, batch.table.page_size
        self.batch_sizes.append(len(batch.rows))
        assert len(set(batch.rows.tolist())) == len(batch.rows) > 0
        assert 0 < batch.num_scheduled_tokens.sum() <= self.max_tokens
        assert (batch.num_scheduled_tokens[: batch.num_decodes] == 1).all()
        assert (batch.num_scheduled_tokens[batch.num_decodes :] > 1).all()
        self.known.update({row: request.request_id for row, request in batch.new_requests})
        drawn = []
        for row, computed, new, samples in zip(
            batch.rows, batch.num_computed_tokens, batch.num_scheduled_tokens, batch.samples, strict=True
        ):
            assert row in self.known
            tokens = table.token_ids[row, : table.num_tokens[row]]
            if POISON in tokens:
                raise RuntimeError("poisoned")
            pages = table.page_table[row, : table.num_pages[row]]
            assert len(pages) == -(-len(tokens) // size), "pages = ceil(tokens / page_size)"
            for position in range(computed, computed + new):
                self.pages[pages[position // size], position % size] = tokens[position]
            cached = self.pages[pages].ravel()[: computed + new]
            assert (cached == tokens[: computed + new]).all(), "somebody else wrote into this request's pages"
            assert samples == (computed + new == len(tokens))
            if samples:
                drawn.append(next_token(tokens))
        return ModelOutput(np.array(drawn, np.int32))

    def shutdown(self) -> None:
        self.shut_down = True


def make_engine(**overrides) -> EngineCore:
    settings = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 40,
        "page_size": 4,
        "num_pages": 12,
        **overrides,
    }
    scheduler = Scheduler(**settings)
    return EngineCore(scheduler, SimulatedExecutor(scheduler), check_when_idle=True)


def make_request(request_id: str, prompt, max_tokens: int = 5, stop=()) -> EngineRequest:
    return EngineRequest(request_id, np.array(prompt, np.int32), SamplingParams(), max_tokens, 0, tuple(stop))


def run(core: EngineCore, *requests: EngineRequest):
    """Everything to its end: request id -> (tokens, finish reason, error)."""
    core.apply([Add(request) for request in requests])
    tokens: dict[str, list[int]] = defaultdict(list)
    finals = {}
    while core.has_work:
        for output in core.step().outputs:
            assert output.request_id not in finals, "nothing comes after the last output"
            tokens[output.request_id] += output.token_ids
            if output.finish_reason:
                finals[output.request_id] = (tokens[output.request_id], output.finish_reason, output.error)
        core.scheduler.check()
    return finals
