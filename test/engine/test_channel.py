"""The engine's side of the pipes."""

import asyncio
import multiprocessing
import pickle
import struct
import threading
import time

import pytest
import uvloop

from simple_flashinfer.engine.channel import EngineFailure, ProcessChannel, ProcessEngineEnd
from simple_flashinfer.types import Abort, Add, EngineOutput, EngineStats, FinishReason, StepOutputs, TokenLogprobs
from test.core.simulation import make_request

STEPS, REQUESTS = 300, 64  # a pipe takes 213 kB; these are 3 kB a front end and step


@pytest.fixture
def pipes():
    ours, theirs = zip(*(multiprocessing.Pipe() for _ in range(2)), strict=True)
    end = ProcessEngineEnd(theirs)
    for name, connection in zip("ab", ours, strict=True):
        connection.send([Add(make_request(f"{name}{number}", [1])) for number in range(REQUESTS)])
    assert len(end.recv(block=False)) == 2 * REQUESTS
    yield end, *ours
    for connection in (*ours, *theirs):
        connection.close()


def step(number):
    reason = FinishReason.LENGTH if number == STEPS - 1 else None
    return StepOutputs(
        [EngineOutput(f"{name}{i}", [number], reason) for name in "ab" for i in range(REQUESTS)],
        EngineStats(num_steps=number),
    )


def read(connection, answers):
    """What has come, into token ids and finish reasons by request."""
    while connection.poll():
        for output in connection.recv().outputs:
            tokens, reasons = answers.setdefault(output.request_id, ([], []))
            tokens += output.token_ids
            reasons.append(output.finish_reason)


def test_a_front_end_that_does_not_read_holds_up_nobody(pipes):
    end, slow, quick = pipes
    answers, late = {}, {}
    for number in range(STEPS):
        end.send(step(number))
        assert end.recv(block=False) == []
        read(quick, answers)
    whole = list(range(STEPS))
    assert len(answers) == REQUESTS
    assert all(
        tokens == whole and reasons == [None] * (STEPS - 1) + [FinishReason.LENGTH] for tokens, reasons in answers.values()
    )
    read(slow, late)
    assert all(len(tokens) < STEPS for tokens, _ in late.values()), "the pipe was full"
    while any(tokens != whole for tokens, _ in late.values()):
        assert end.recv(block=False) == []
        assert slow.poll(), "what was kept comes as soon as there is room"
        read(slow, late)
    assert len(late) == REQUESTS
    assert all(reasons[-1] and not any(reasons[:-1]) for _, reasons in late.values())
    assert all(len(reasons) < STEPS for _, reasons in late.values()), "joined"


def test_an_idle_engine_sends_what_it_kept(pipes):
    end, slow, quick = pipes
    for number in range(STEPS):
        end.send(step(number))
        read(quick, {})
    late, commands = {}, []
    idle = threading.Thread(target=lambda: commands.extend(end.recv(block=True)), daemon=True)
    idle.start()
    while not late or any(len(tokens) < STEPS for tokens, _ in late.values()):
        assert slow.poll(5)
        read(slow, late)
    quick.send([Abort("b0")])
    idle.join(5)
    assert commands == [Abort("b0")]


def test_a_failure_is_told_to_who_reads(pipes):
    end, _, quick = pipes
    for number in range(STEPS):
        end.send(step(number))
        read(quick, {})
    end.send(EngineFailure("lost"))
    assert quick.recv() == EngineFailure("lost")


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_messages_that_come_in_parts_are_read_whole(make_loop):
    """More than a pipe takes comes so; uvloop watches a pipe its own way."""
    ours, theirs = multiprocessing.Pipe()
    channel, end = ProcessChannel(ours), ProcessEngineEnd([theirs])
    message = StepOutputs([EngineOutput("a", list(range(20_000)), FinishReason.LENGTH)], EngineStats())

    def send():
        data = pickle.dumps(message)
        theirs._send(struct.pack("!i", len(data)) + data[:100])
        time.sleep(0.05)
        theirs._send(data[100:])

    async def exchange():
        came = asyncio.get_running_loop().create_future()
        channel.start(asyncio.get_running_loop(), came.set_result)
        await asyncio.to_thread(send)
        assert await came == message
        channel.send(Add(make_request("a", [1] * 300_000)))  # the other way
        await asyncio.sleep(0.05)
        (add,) = await asyncio.to_thread(end.recv, True)
        assert len(add.request.prompt_token_ids) == 300_000
        await asyncio.to_thread(channel.close)

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(exchange())


def test_an_output_crosses_whole():
    logprobs = TokenLogprobs(7, -0.5, 2, ((8, -0.25),))
    output = EngineOutput("a", [7], FinishReason.ERROR, "why", 3, (logprobs,), [logprobs])
    assert pickle.loads(pickle.dumps(output)) == output
