"""The loop between its two ends, in a thread and over a pipe."""

import asyncio
import multiprocessing
import threading
import time

import pytest

from simple_flashinfer.engine.async_engine import AsyncEngine, QueueFullError
from simple_flashinfer.engine.channel import EngineFailure, ProcessChannel, ProcessEngineEnd, ThreadChannel
from simple_flashinfer.engine.loop import serve
from simple_flashinfer.types import EngineDeadError, EngineInfo, FinishReason
from test.core.simulation import POISON, VOCABULARY, expected_output, make_engine, make_request

INFO = EngineInfo(max_model_len=40, vocab_size=VOCABULARY, page_size=4, num_pages=12, eos_token_ids=())


@pytest.fixture(params=["thread", "pipe"])
def connect(request):
    def make(core, microsleep=1e-4):
        if request.param == "thread":
            return ThreadChannel(lambda end: serve(core, end, microsleep))
        ours, theirs = multiprocessing.Pipe()
        thread = threading.Thread(target=serve, args=(core, ProcessEngineEnd([theirs]), microsleep), daemon=True)
        thread.start()

        def wait():
            thread.join(5)
            theirs.close()

        return ProcessChannel(ours, wait)

    return make


async def collect(engine, request):
    with engine.places([request]):
        outputs = [output async for output in engine.generate(request)]
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    return [token for output in outputs for token in output.token_ids], outputs[-1].finish_reason


async def test_many_requests(connect):
    core = make_engine()
    engine = AsyncEngine(connect(core), INFO, max_requests=100)
    engine.start()
    requests = [make_request(str(i), [i % 30 + 1] * (1 + i % 9), 1 + i % 12, stop=[i % 7]) for i in range(60)]
    results = await asyncio.gather(*(collect(engine, request) for request in requests))
    assert results == [expected_output(request) for request in requests]
    assert engine.stats.num_free_pages == 12
    await engine.close()
    assert core.stopped
    assert core.executor.shut_down


async def test_who_stops_iterating_aborts(connect):
    core = make_engine(max_model_len=10_000, num_pages=3000)
    engine = AsyncEngine(connect(core), INFO, max_requests=2)
    engine.start()
    request = make_request("a", [1], 9000)
    with engine.places([request]):
        steps = engine.generate(request)
        await anext(steps)
        await steps.aclose()
    engine.check_ready(2)
    while engine.stats.num_running or engine.stats.num_steps == 0:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert engine.stats.num_steps < 8000
    await engine.close()
    core.scheduler.check()
    assert not core.scheduler.has_requests


async def test_a_full_engine_refuses(connect):
    engine = AsyncEngine(connect(make_engine(max_model_len=10_000, num_pages=3000)), INFO, max_requests=1)
    engine.start()
    with engine.places([make_request("a", [1])]), pytest.raises(QueueFullError):
        await collect(engine, make_request("b", [1]))
    request = make_request("f", [1], 2)
    with engine.places([request]):
        assert [output async for output in engine.generate(request)]
        assert (await collect(engine, make_request("g", [1], 2)))[1] is FinishReason.LENGTH, "who is done leaves its place"
    together = [make_request(name, [1]) for name in "cd"]
    with pytest.raises(QueueFullError), engine.places(together):
        pass
    assert (await collect(engine, make_request("e", [1], 2)))[1] is FinishReason.LENGTH, "nothing was taken for the others"
    await engine.close()


async def test_one_bad_request_is_told_alone(connect):
    engine = AsyncEngine(connect(make_engine()), INFO, max_requests=10)
    engine.start()
    good = [make_request(str(i), [i + 1], 6) for i in range(3)]
    results = await asyncio.gather(*(collect(engine, request) for request in [*good, make_request("bad", [POISON])]))
    assert results[:3] == [expected_output(request) for request in good]
    assert results[3] == ([], FinishReason.ERROR)
    await engine.close()


async def test_a_loop_that_dies_tells_everybody(connect):
    core = make_engine()

    def die(batch):
        raise EngineDeadError("the device is lost")

    core.executor.execute = die
    engine = AsyncEngine(connect(core), INFO, max_requests=10)
    engine.start()
    results = await asyncio.gather(*(collect(engine, make_request(str(i), [1])) for i in range(4)), return_exceptions=True)
    for result in results:
        assert isinstance(result, EngineDeadError) or result[1] is FinishReason.ERROR
    assert "the device is lost" in engine.failure
    engine._on_message(EngineFailure("and then the pipe broke"))
    assert "the device is lost" in engine.failure, "the first failure is the cause"
    with pytest.raises(EngineDeadError):
        engine.check_ready()
    await engine.close()


async def test_idle_it_costs_nothing(connect):
    engine = AsyncEngine(connect(make_engine()), INFO, max_requests=10)
    engine.start()
    await collect(engine, make_request("a", [1]))
    await asyncio.sleep(0.05)
    before = time.process_time()
    await asyncio.sleep(0.5)
    assert time.process_time() - before < 0.05
    await engine.close()


async def test_requests_that_come_together_start_together(connect):
    core = make_engine(max_num_batched_tokens=100, num_pages=100)
    engine = AsyncEngine(connect(core, microsleep=0.05), INFO, max_requests=10)
    engine.start()
    await asyncio.gather(*(collect(engine, make_request(str(i), [i + 1], 3)) for i in range(4)))
    assert core.executor.batch_sizes == [4, 4, 4]
    await engine.close()
