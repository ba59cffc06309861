"""An executor without a model: it writes tokens into simulated pages, and reads them back as attention would.

`execute` takes what it needs from the table; the step itself runs as late as it can: when its result is asked for.
"""

from collections import defaultdict, deque

import numpy as np

from simple_flashinfer.core.engine import EngineCore
from simple_flashinfer.core.scheduler import Scheduler
from simple_flashinfer.types import UNKNOWN_TOKEN, Add, EngineRequest, FinishReason, ModelOutput, SamplingParams

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


class Running:
    def __init__(self, executor: "SimulatedExecutor", work) -> None:
        self.executor, self.work = executor, work
        self.outcome = None

    def result(self) -> ModelOutput:
        while self.outcome is None:
            first = self.executor.queue.popleft()
            try:
                first.outcome = first.work()
            except Exception as error:
                first.outcome = error
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class SimulatedExecutor:
    def __init__(self, scheduler: Scheduler) -> None:
        self.max_tokens = scheduler.max_num_batched_tokens
        self.pages = np.full((scheduler.kv.pool.num_pages, scheduler.table.page_size), -1)
        self.batch_sizes: list[int] = []
        self.known: dict[int, EngineRequest] = {}
        self.drawn: dict[int, int] = {}  # by row
        self.queue: deque[Running] = deque()
        self.fail_soon = False
        self.shut_down = False

    def execute(self, batch) -> Running:
        table, size = batch.table, batch.table.page_size
        self.batch_sizes.append(len(batch.rows))
        assert len(set(batch.rows.tolist())) == len(batch.rows) > 0
        assert 0 < batch.num_scheduled_tokens.sum() <= self.max_tokens
        assert (batch.num_scheduled_tokens[: batch.num_decodes] == 1).all()
        assert (batch.num_scheduled_tokens[batch.num_decodes :] > 1).all()
        self.known.update(dict(batch.new_requests))
        work = []
        for row, computed, end, samples in zip(
            batch.rows.tolist(), batch.num_computed_tokens.tolist(), batch.ends.tolist(), batch.samples, strict=True
        ):
            assert row in self.known
            assert table.num_tokens[row] == end + 1 if samples else table.num_tokens[row] > end
            tokens = table.token_ids[row, : table.num_tokens[row] - samples].copy()
            pages = table.page_table[row, : table.num_pages[row]].copy()
            assert len(pages) == -(-len(tokens) // size), "pages = ceil(tokens / page_size)"
            assert not self.known[row].looks_back or UNKNOWN_TOKEN not in tokens, "it draws by what is not known yet"
            work.append((row, tokens, pages, computed, end, samples))
        running = Running(self, lambda: self._run(work, size))
        self.queue.append(running)
        return running

    def _run(self, work, size) -> ModelOutput:
        drawn = []
        for row, tokens, pages, computed, end, samples in work:
            if POISON in tokens:
                raise RuntimeError("poisoned")
            if self.fail_soon:
                self.fail_soon = False
                raise MemoryError
            if tokens[-1] == UNKNOWN_TOKEN:
                tokens[-1] = self.drawn[row]
            assert (np.flatnonzero(tokens == UNKNOWN_TOKEN) < computed).all(), "a step computes one unknown token at most"
            for position in range(computed, end):
                self.pages[pages[position // size], position % size] = tokens[position]
            cached = self.pages[pages].ravel()[:end]
            assert (cached == np.where(tokens[:end] == UNKNOWN_TOKEN, cached, tokens[:end])).all(), (
                "somebody else wrote into this request's pages"
            )
            if samples:
                self.drawn[row] = next_token(cached)
                drawn.append(self.drawn[row])
        return ModelOutput(np.array(drawn, np.int32))

    def shutdown(self) -> None:
        self.shut_down = True


def make_engine(overlap: bool = False, **overrides) -> EngineCore:
    settings = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 40,
        "page_size": 4,
        "num_pages": 12,
        **overrides,
    }
    scheduler = Scheduler(**settings)
    return EngineCore(scheduler, SimulatedExecutor(scheduler), overlap, check_when_idle=True)


def make_request(request_id: str, prompt, max_tokens: int = 5, stop=(), looks_back: bool = False) -> EngineRequest:
    params = SamplingParams(presence_penalty=1.0 if looks_back else 0.0)
    return EngineRequest(request_id, np.array(prompt, np.int32), params, max_tokens, 0, tuple(stop))


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
