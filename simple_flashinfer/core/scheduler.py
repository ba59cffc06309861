"""Which tokens to compute in the next step.

There is no prefill phase and no decode phase. Every request has `num_tokens` known and `num_computed_tokens` computed;
each step lets the second catch up with the first under one budget, `max_num_batched_tokens`. A decode is a request
that is one behind; a chunked prefill is one that gets less than it is behind; preemption sets the second number to 0, and a
beginning that is in the cache starts it higher.

A scheduled step counts as done at once, with tokens that are not known yet (UNKNOWN_TOKEN), so that the next can be
scheduled while it runs. `update` fills the tokens in; `rollback` takes back what failed. A request that ends by a stop
token is in one step more by then; what that draws is dropped. What can't be decided without the tokens waits for them:
who is preempted, and requests whose drawing looks back at their output.

Order is first come, first served, within one priority. When pages run out the last running request in that order is
preempted, back into the queue; the first can always go on (a request that could not have the whole pool is refused by
`add`), so every request ends that nothing more urgent keeps coming before.

Whatever happens each step to each request is array arithmetic over the rows of the `RequestTable`; Python loops run
over what is rare: requests that start, end or are preempted, and the outputs.
"""

import heapq
import itertools
from collections import deque
from dataclasses import replace

import numpy as np

from simple_flashinfer.core.kv_cache import KVCacheManager
from simple_flashinfer.core.request import NO_ROW, Request
from simple_flashinfer.types import (
    UNKNOWN_TOKEN,
    BoolArray,
    EngineOutput,
    EngineRequest,
    EngineStats,
    FinishReason,
    Int32Array,
    ModelOutput,
    RequestTable,
    SchedulerOutput,
    TokenLogprobs,
)

_NO_TOKEN = -2  # neither a token nor an unknown one
_NOBODY = -1
_PROMPT_LOGPROBS_CHUNK = 256  # tokens a step, of a request that wants a whole vocabulary of logits for each


class Scheduler:
    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        page_size: int,
        num_pages: int,
        prefix_caching: bool = True,
    ) -> None:
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.table = RequestTable(max_num_seqs, max_model_len, page_size)
        self.kv = KVCacheManager(self.table, num_pages, prefix_caching)
        self._requests: dict[str, Request] = {}
        self._arrivals = itertools.count()
        self._waiting: dict[str, Request] = {}
        self._queue: list[tuple[tuple[int, int], Request]] = []  # a heap; those no longer in _waiting are passed over
        self._running: Int32Array = np.empty(0, np.int32)  # rows, in the order in which they came to run
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._by_row: list[Request | None] = [None] * max_num_seqs
        self._unannounced: dict[int, Request] = {}  # rows whose request the executor has not been told of
        self._in_flight: deque[SchedulerOutput] = deque()  # oldest first
        self._arrival = np.full(max_num_seqs, _NOBODY, np.int64)
        self._looks_back = np.zeros(max_num_seqs, np.bool_)
        self._max_total_tokens = np.zeros(max_num_seqs, np.int32)
        self._most_per_step = np.zeros(max_num_seqs, np.int32)
        self._stop_token_ids = np.full((max_num_seqs, 4), _NO_TOKEN, np.int32)
        self._num_steps = 0
        self._num_preemptions = 0

    # -- coming and going ------------------------------------------------------------------------------------------

    def add(self, spec: EngineRequest) -> None:
        """Queues a request. Raises ValueError, naming the limit, when it could never run."""
        num_prompt, total = len(spec.prompt_token_ids), len(spec.prompt_token_ids) + spec.max_tokens
        if spec.request_id in self._requests:
            raise ValueError(f"request_id {spec.request_id!r} is in use")
        if num_prompt == 0 or spec.max_tokens < 1:
            raise ValueError("a request needs at least one prompt token and max_tokens of at least 1")
        # the last token is drawn but never computed: it needs no page
        if total > self.max_model_len or self.kv.pages_for(total - 1) > self.kv.pool.num_pages:
            limit = min(self.max_model_len, self.kv.pool.num_pages * self.table.page_size + 1)
            raise ValueError(f"prompt and output of {num_prompt} + {spec.max_tokens} tokens do not fit into {limit}")
        request = Request(spec, np.asarray(spec.prompt_token_ids, np.int32), next(self._arrivals))
        self._requests[request.id] = request
        self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        self._waiting[request.id] = request
        heapq.heappush(self._queue, (request.order, request))

    def abort(self, request_id: str) -> bool:
        """Forgets a request, running or waiting, and frees its pages. False when there is no such request."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        if request.row == NO_ROW:
            del self._waiting[request_id]
        else:
            self._running = self._running[self._running != request.row]
            self._vacate(request)
        del self._requests[request_id]
        return True

    def is_running(self, request_id: str) -> bool:
        request = self._requests.get(request_id)
        return request is not None and request.row != NO_ROW

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    # -- a step ----------------------------------------------------------------------------------------------------

    def schedule(self, only: str | None = None) -> SchedulerOutput | None:
        """The next step, in flight from now on until `update` or `rollback`.

        None when there is nothing to compute, or nothing before an update. `only` runs one running request alone.
        """
        table = self.table
        if only is None:
            # of a request whose last token is on its way nothing is left to compute
            rows = self._running[table.num_tokens[self._running] < self._max_total_tokens[self._running]]
            if self._in_flight and self._looks_back[rows].any():
                return None
            preempted = False
            if not self.kv.allocate(rows):
                if self._in_flight:
                    return None
                self._preempt()
                preempted, rows = True, self._running
        else:
            preempted = False
            rows = np.array([self._requests[only].row], np.int32)
        pending = table.num_tokens[rows] - table.num_computed_tokens[rows]
        before = np.cumsum(pending) - pending
        num_scheduled = np.clip(self.max_num_batched_tokens - before, 0, pending).astype(np.int32)
        num_scheduled = np.minimum(num_scheduled, self._most_per_step[rows])
        if only is None and not preempted:
            new_rows, admitted = self._admit(self.max_num_batched_tokens - int(num_scheduled.sum()))
            if new_rows:
                rows = np.append(rows, np.array(new_rows, np.int32))
                num_scheduled = np.append(num_scheduled, np.array(admitted, np.int32))
        # one-token rows first: they take the decode kernel, and the order is otherwise kept
        order = np.argsort(num_scheduled > 1, kind="stable")
        order = order[num_scheduled[order] > 0]
        if not len(order):
            return None
        rows, num_scheduled = rows[order], num_scheduled[order]
        batch = SchedulerOutput(
            rows=rows,
            num_scheduled_tokens=num_scheduled,
            num_computed_tokens=table.num_computed_tokens[rows],
            num_decodes=int((num_scheduled == 1).sum()),
            samples=table.num_computed_tokens[rows] + num_scheduled == table.num_tokens[rows],
            table=table,
            new_requests=[
                (row, request.spec) for row in rows.tolist() if (request := self._unannounced.pop(row, None)) is not None
            ]
            if self._unannounced
            else [],
            arrivals=self._arrival[rows],
        )
        table.num_computed_tokens[rows] += num_scheduled
        drawing = rows[batch.samples]
        table.token_ids[drawing, table.num_tokens[drawing]] = UNKNOWN_TOKEN
        table.num_tokens[drawing] += 1
        self._in_flight.append(batch)
        return batch

    def update(self, batch: SchedulerOutput, result: ModelOutput) -> list[EngineOutput]:
        """Takes in what the oldest step in flight computed; finished requests leave."""
        assert batch is self._in_flight[0]
        self._in_flight.popleft()
        self._num_steps += 1
        if not (here := self._still_there(batch)).all():
            batch, result = _part(batch, result, here)
        table = self.table
        self.kv.seal(batch.rows, batch.ends, self._by_row)
        for row, prompt_logprobs in result.prompt_logprobs.items():
            self._take_prompt_logprobs(row, prompt_logprobs, int(batch.num_computed_tokens[batch.rows == row][0]))
        rows, ends, tokens = batch.rows[batch.samples], batch.ends[batch.samples], result.token_ids
        first = np.flatnonzero(ends == table.num_prompt_tokens[rows])
        table.token_ids[rows, ends] = tokens
        stopped = (self._stop_token_ids[rows] == tokens[:, None]).any(axis=1)
        done = stopped | (ends + 1 >= self._max_total_tokens[rows])

        by_row = self._by_row
        outputs = [
            EngineOutput(by_row[row].spec.request_id, [token])
            for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)
        ]
        for index in first.tolist():
            request = by_row[rows[index]]
            assert request is not None
            outputs[index].num_cached_tokens = request.num_cached_tokens
            if request.spec.params.prompt_logprobs is not None:
                outputs[index].prompt_logprobs = request.prompt_logprobs
        for index, logprobs in result.logprobs.items():
            outputs[index].logprobs = (logprobs,)
        if done.any():
            for index in np.flatnonzero(done).tolist():
                outputs[index].finish_reason = FinishReason.STOP if stopped[index] else FinishReason.LENGTH
                request = by_row[rows[index]]
                assert request is not None
                self._vacate(request)
                del self._requests[request.id]
            self._running = self._running[np.isin(self._running, rows[done], invert=True)]
        return outputs

    def rollback(self) -> None:
        """As if the steps in flight had not been scheduled. What they wrote to pages will be written again."""
        table = self.table
        while self._in_flight:
            batch = self._in_flight.pop()
            here = self._still_there(batch)
            table.num_computed_tokens[batch.rows[here]] = batch.num_computed_tokens[here]
            table.num_tokens[batch.rows[here & batch.samples]] -= 1
            for row, spec in batch.new_requests:
                if (request := self._by_row[row]) is not None and request.spec is spec:
                    self._unannounced[row] = request
        self.kv.trim(self._running)

    def _still_there(self, batch: SchedulerOutput) -> BoolArray:
        """bool [R]. Others left while the step was in flight, and their rows may be somebody else's."""
        here: BoolArray = self._arrival[batch.rows] == batch.arrivals
        return here

    def _take_prompt_logprobs(self, row: int, logprobs: list[TokenLogprobs], start: int) -> None:
        """Of the prompt's tokens from start + 1 on; after a preemption some are there already."""
        request = self._by_row[row]
        assert request is not None
        request.prompt_logprobs += logprobs[len(request.prompt_logprobs) - start :]

    # -- places ----------------------------------------------------------------------------------------------------

    def _preempt(self) -> None:
        """Sends the youngest running requests back to the queue until the others have the pages they need."""
        while not self.kv.allocate(self._running):
            _, request = max((r.order, r) for row in self._running.tolist() if (r := self._by_row[row]) is not None)
            self._running = self._running[self._running != request.row]
            request.token_ids = self.table.token_ids[request.row, : self.table.num_tokens[request.row]].copy()
            self._vacate(request)
            self._enqueue(request)
            self._num_preemptions += 1

    def _admit(self, budget: int) -> tuple[list[int], list[int]]:
        """Moves waiting requests into free rows, in order; these rows, and the tokens that each may compute in this step."""
        admitted: list[int] = []
        new_rows: list[int] = []
        while self._waiting and self._free_rows and budget > 0:
            _, request = self._queue[0]
            if self._waiting.get(request.id) is not request:  # left meanwhile
                heapq.heappop(self._queue)
                continue
            # Each running request may soon want one page more. Without this reserve an admission would often be
            # followed by a preemption, and its prompt be computed twice.
            reserve = len(self._running) + len(new_rows)
            matched = self.kv.match(request)
            missing = self.kv.pages_for(len(request.token_ids)) - len(matched)
            if missing + reserve > self.kv.pages_left(matched):
                break
            del self._waiting[request.id]
            heapq.heappop(self._queue)
            self._occupy(request, matched)
            new_rows.append(request.row)
            pending = len(request.token_ids) - int(self.table.num_computed_tokens[request.row])
            admitted.append(min(budget, pending, int(self._most_per_step[request.row])))
            budget -= admitted[-1]
        if new_rows:
            self._running = np.append(self._running, np.array(new_rows, np.int32))
        return new_rows, admitted

    def _occupy(self, request: Request, matched: Int32Array) -> None:
        table, row = self.table, self._free_rows.pop()
        request.row = row
        self._by_row[row] = self._unannounced[row] = request
        self._arrival[row] = request.arrival
        self._looks_back[row] = request.spec.looks_back
        num_tokens = len(request.token_ids)
        table.token_ids[row, :num_tokens] = request.token_ids
        table.num_tokens[row] = num_tokens
        table.num_prompt_tokens[row] = len(request.spec.prompt_token_ids)
        self._max_total_tokens[row] = request.max_total_tokens
        self._most_per_step[row] = _PROMPT_LOGPROBS_CHUNK if request.wants_prompt_logprobs else self.max_num_batched_tokens
        stops = request.spec.stop_token_ids
        if (extra := len(stops) - self._stop_token_ids.shape[1]) > 0:
            self._stop_token_ids = np.pad(self._stop_token_ids, ((0, 0), (0, extra)), constant_values=_NO_TOKEN)
        self._stop_token_ids[row] = _NO_TOKEN
        self._stop_token_ids[row, : len(stops)] = stops
        self.kv.adopt(row, matched)
        if request.num_cached_tokens is None:
            request.num_cached_tokens = int(table.num_computed_tokens[row])
        self.kv.allocate(np.array([row], np.int32))

    def _vacate(self, request: Request) -> None:
        """Takes a request out of its row; its caller takes the row out of `_running`."""
        row, request.row = request.row, NO_ROW
        self.kv.free(row)
        self._by_row[row] = None
        self._arrival[row] = _NOBODY
        self._unannounced.pop(row, None)
        self._free_rows.append(row)

    # -- looking inside --------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        pool = self.kv.pool
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_free_pages=pool.num_free,
            num_pages=pool.num_pages,
            num_preemptions=self._num_preemptions,
            num_steps=self._num_steps,
        )

    def ids_of(self, batch: SchedulerOutput) -> list[str]:
        """Of those of its requests that are still there."""
        rows = batch.rows[self._still_there(batch)]
        return [request.id for row in rows.tolist() if (request := self._by_row[row]) is not None]

    def check(self) -> None:
        """Raises AssertionError when rows, requests and pages do not agree. For tests, and when idle in debug mode."""
        table, running = self.table, self._running
        self.kv.check(running)
        occupied = [row for row, request in enumerate(self._by_row) if request is not None]
        assert sorted(running.tolist()) == occupied
        assert sorted([*occupied, *self._free_rows]) == list(range(len(self._by_row)))
        assert len(self._requests) == len(running) + len(self._waiting)
        assert (table.num_computed_tokens[running] < table.num_tokens[running]).all()
        assert (table.num_tokens[running] < self._max_total_tokens[running] + bool(self._in_flight)).all()


def _part(batch: SchedulerOutput, result: ModelOutput, here: BoolArray) -> tuple[SchedulerOutput, ModelOutput]:
    """What concerns some of a step's requests; `here`: bool [R], which."""
    drawn = np.flatnonzero(here[batch.samples])
    rows = set(batch.rows[here].tolist())
    return replace(
        batch,
        rows=batch.rows[here],
        arrivals=batch.arrivals[here],
        num_scheduled_tokens=batch.num_scheduled_tokens[here],
        num_computed_tokens=batch.num_computed_tokens[here],
        num_decodes=int(here[: batch.num_decodes].sum()),
        samples=batch.samples[here],
    ), ModelOutput(
        result.token_ids[drawn],
        {new: result.logprobs[old] for new, old in enumerate(drawn.tolist()) if old in result.logprobs},
        {row: logprobs for row, logprobs in result.prompt_logprobs.items() if row in rows},
    )
