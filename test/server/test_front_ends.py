"""`--api_processes`: several processes that serve HTTP in front of one engine."""

import asyncio
import contextlib
import os
import signal
import time

import httpx
import psutil
import pytest

from test.daemon import Daemon

FLAGS = ("--api_processes", "2")
STREAMS = 24


@pytest.fixture(scope="module")
def shared(random_model):
    with Daemon("--model", random_model, "--torch_dtype", "float32", *FLAGS) as daemon:
        wait_for_listeners(daemon)
        yield daemon


def processes(daemon):
    parent = psutil.Process(daemon.process.pid)
    return [parent, *parent.children(recursive=True)]


def connections(process, status):
    return [c for c in process.net_connections("tcp") if c.status == status]


def wait_for_listeners(daemon):
    """The first process announces itself; the others may still be importing."""
    deadline = time.monotonic() + 60
    while sum(bool(connections(p, psutil.CONN_LISTEN)) for p in processes(daemon)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def body(seed, **more):
    return {"prompt": "def main", "seed": seed, "max_tokens": 40, "ignore_eos": True, **more}


async def stream(client, url, seed, opened):
    """The text, or None where the connection broke."""
    text = ""
    try:
        async with client.stream("POST", url, json=body(seed, stream=True, max_tokens=400)) as response:
            async for line in response.aiter_lines():
                opened.set()
                if line.startswith("data: {"):
                    text += httpx.Response(200, content=line[6:]).json()["choices"][0]["text"]
    except httpx.TransportError:
        return None
    finally:
        opened.set()
    return text


async def with_streams(daemon, act):
    """What each of many streams gave, with `act` called with their tasks when all of them run."""
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        opened = [asyncio.Event() for _ in range(STREAMS)]
        tasks = [
            asyncio.create_task(stream(client, daemon.url + "/v1/completions", seed, event))
            for seed, event in enumerate(opened)
        ]
        for event in opened:
            await event.wait()
        await act(tasks)
        return await asyncio.gather(*tasks)


def serving_children(daemon):
    """Those that serve a connection; not the first process, and not the engine."""
    return [p for p in processes(daemon)[1:] if connections(p, psutil.CONN_ESTABLISHED)]


@pytest.fixture(scope="module")
def together(shared):
    async def look(tasks):
        assert len(serving_children(shared)) == 1, "and the first process"
        assert connections(processes(shared)[0], psutil.CONN_ESTABLISHED)

    return asyncio.run(with_streams(shared, look))


def test_connections_are_dealt_out_and_answers_are_the_same(shared, together, daemon):
    alone = [daemon.post("/v1/completions", body(seed, max_tokens=400)).json()["choices"][0]["text"] for seed in (0, 11, 23)]
    assert [together[seed] for seed in (0, 11, 23)] == alone
    shared.wait_until_idle()


def test_one_that_is_stopped_holds_up_only_its_own_answers(shared, together):
    async def stop_one(tasks):
        (victim,) = serving_children(shared)
        victim.suspend()
        try:
            others = STREAMS - len(connections(victim, psutil.CONN_ESTABLISHED))
            async with asyncio.timeout(20):
                while sum(task.done() for task in tasks) < others:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        finally:
            victim.resume()

    assert asyncio.run(with_streams(shared, stop_one)) == together
    shared.wait_until_idle()


def test_without_a_seed_no_two_processes_draw_the_same(shared):
    answers = [shared.post("/v1/completions", body(None)).json()["choices"][0]["text"] for _ in range(12)]
    assert len(set(answers)) == len(answers)


def test_a_response_is_known_to_all_of_them(shared):
    first = shared.post("/v1/responses", {"input": "Hello", "max_output_tokens": 5}).json()
    for _ in range(12):
        assert shared.get("/v1/responses/" + first["id"]) == first
        answer = shared.post(
            "/v1/responses", {"input": "Go on", "previous_response_id": first["id"], "max_output_tokens": 5}
        )
        assert answer.status_code == 200, answer.text
    assert httpx.delete(shared.url + "/v1/responses/" + first["id"]).json()["deleted"]
    assert {httpx.get(shared.url + "/v1/responses/" + first["id"]).status_code for _ in range(12)} == {404}


def test_one_that_dies_takes_only_its_own_requests_along(random_model):
    with Daemon("--model", random_model, *FLAGS) as daemon:
        wait_for_listeners(daemon)

        async def kill_one(tasks):
            serving_children(daemon)[0].kill()

        texts = asyncio.run(with_streams(daemon, kill_one))
        assert any(text is None for text in texts)
        assert any(text for text in texts)
        daemon.wait_until_idle()
        for _ in range(8):
            assert daemon.post("/v1/completions", body(1)).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_all_of_them_end_together(random_model, tmp_path, number):
    daemon = Daemon("--model", random_model, *FLAGS, env={"TMPDIR": str(tmp_path)})
    with daemon:
        wait_for_listeners(daemon)
        everyone = processes(daemon)
        assert daemon.post("/v1/responses", {"input": "Hello", "max_output_tokens": 5}).status_code == 200
        assert list(tmp_path.glob("simple-flashinfer-*/responses.db"))
        request = body(1, stream=True, max_tokens=1900)
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.stream("POST", daemon.url + "/v1/completions", json=request) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            os.kill(daemon.process.pid, number)
            for _ in lines:
                pass
        _, alive = psutil.wait_procs(everyone, timeout=20)
    assert not alive
    assert not any("Traceback" in line for line in daemon.log), "\n".join(daemon.log)
    if number != signal.SIGKILL:
        assert not list(tmp_path.glob("simple-flashinfer-*")), "responses are forgotten"


def test_a_port_that_is_taken_is_seen(shared, random_model):
    second = Daemon("--model", random_model, "--port", shared.url.rsplit(":", 1)[1], *FLAGS)
    assert second.process.wait(60) == 2
    second._reader.join(5)
    assert "can't listen" in second.log[-1]


def test_they_need_an_engine_process(random_model):
    daemon = Daemon("--model", random_model, "--engine_process", "false", *FLAGS)
    assert daemon.process.wait(60) == 2
    daemon._reader.join(5)
    assert daemon.log[-1] == "simple-flashinfer: error: --api_processes 2 needs --engine_process true"
