"""Daemons with settings of their own: keys, full queues, engines in a process, and engines that die."""

import asyncio
import os
import signal
import subprocess
import time

import httpx
import openai
import pytest

from test.daemon import Daemon

PROMPT = {"prompt": "def main", "temperature": 0, "max_tokens": 8}


def endless(**more):
    return {"prompt": "go on", "max_tokens": 2000, "ignore_eos": True, "stream": True, **more}


@pytest.fixture(scope="module")
def keyed(random_model):
    """Asks for a key, and is there for the pages of one site."""
    env = {"API_KEY": "sesame", "CORS_ORIGINS": "https://Page.example, http://localhost:3000"}
    with Daemon("--model", random_model, env=env) as running:
        yield running


def test_api_key(keyed, random_model):
    assert httpx.get(keyed.url + "/health").status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer sesam\xe9".encode("latin1")}):
        response = httpx.post(keyed.url + "/v1/completions", json=PROMPT, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    public = {"/", "/health", "/version"}
    for path, methods in keyed.get("/openapi.json")["paths"].items():
        for method in methods:
            status = httpx.request(method, keyed.url + path).status_code
            assert status == (200 if path in public else 401), path
    for path, code in (("/v1/responses", "invalid_api_key"), ("/v1/messages", None), ("/nowhere", "invalid_api_key")):
        response = httpx.post(keyed.url + path, content=b"{" * 10**6, headers={"Content-Type": "application/json"})
        assert response.status_code == 401, "the key comes before the body"
        assert response.json()["error"].get("code") == code
    client = openai.OpenAI(base_url=keyed.url + "/v1", api_key="sesame")
    assert client.completions.create(model=random_model, **PROMPT).choices[0].text


def test_a_browser_s_pages(keyed, daemon):
    url, page = keyed.url + "/v1/completions", {"Origin": "https://page.example"}
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    preflight = httpx.options(url, headers={**page, **ask})
    assert preflight.status_code == 200, "a browser sends no key with it"
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
    key = {"Authorization": "Bearer sesame"}
    for body, headers, status in (
        (PROMPT, key, 200),
        ({**PROMPT, "stream": True}, key, 200),
        (PROMPT, {}, 401),
        ({}, key, 400),
    ):
        answer = httpx.post(url, json=body, headers={**page, **headers})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == page["Origin"], "a page may read errors as well"
    other = {"Origin": "https://other.example"}
    assert "access-control-allow-origin" not in httpx.post(url, json=PROMPT, headers={**other, **key}).headers
    assert httpx.options(url, headers={**other, **ask}).status_code == 400
    assert httpx.options(daemon.url + "/v1/completions", headers={**page, **ask}).status_code == 405, "without the flag"


def test_a_full_queue_is_a_503_with_retry_after_and_nothing_is_lost(random_model):
    flags = ["--model", random_model, "--max_sequence", "2", "--max_waiting", "1"]
    with Daemon(*flags) as daemon:

        async def scenario():
            async with httpx.AsyncClient(timeout=60) as client:
                url = daemon.url + "/v1/completions"
                first = [asyncio.create_task(client.post(url, json=endless(max_tokens=150, stream=False))) for _ in range(3)]
                while daemon.get("/health")["waiting"] != 1:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                refused = await client.post(url, json=PROMPT)
                assert refused.status_code == 503
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["code"] == "queue_full"
                message = {"model": "model", "max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]}
                refused = await client.post(daemon.url + "/v1/messages", json=message)
                assert (refused.status_code, refused.json()["error"]["type"]) == (529, "overloaded_error")
                for answer in await asyncio.gather(*first):
                    assert answer.json()["usage"]["completion_tokens"] == 150
                assert (await client.post(url, json=PROMPT)).status_code == 200

        asyncio.run(scenario())
        daemon.wait_until_idle()
        assert not any("Traceback" in line for line in daemon.log)


def test_several_answers_take_their_places_together(random_model):
    """What was admitted is answered in full, however many others ask before its prompt is computed."""
    with Daemon("--model", random_model, "--max_sequence", "1", "--max_waiting", "4") as daemon:

        async def scenario():
            async with httpx.AsyncClient(timeout=60) as client:
                url = daemon.url + "/v1/completions"

                def waiting(number):
                    return asyncio.to_thread(lambda: daemon.get("/health")["waiting"] == number)

                async with client.stream("POST", url, json=endless()) as running:
                    lines = running.aiter_lines()
                    await anext(lines)
                    several = asyncio.create_task(client.post(url, json={**PROMPT, "n": 3, "ignore_eos": True}))
                    while not await waiting(1):
                        pass
                    last = asyncio.create_task(client.post(url, json=PROMPT))
                    while not await waiting(2):
                        pass
                    assert (await client.post(url, json=PROMPT)).json()["error"]["code"] == "queue_full"
                assert [c["finish_reason"] for c in (await several).json()["choices"]] == ["length"] * 3
                assert (await last).status_code == 200

        asyncio.run(scenario())
        daemon.wait_until_idle()


def test_who_leaves_the_queue_leaves_nothing_behind(random_model):
    with Daemon("--model", random_model, "--max_sequence", "1") as daemon:
        with httpx.stream("POST", daemon.url + "/v1/completions", json=endless(), timeout=60) as response:
            lines = response.iter_lines()  # kept: httpx hangs up when it is dropped
            next(lines)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(daemon.url + "/v1/completions", json=PROMPT, timeout=0.3)
            deadline = time.monotonic() + 5
            while daemon.get("/health")["waiting"]:
                assert time.monotonic() < deadline
        daemon.wait_until_idle()


def test_the_engine_in_a_thread_answers_the_same(random_model, daemon):
    with Daemon("--model", random_model, "--torch_dtype", "float32", "--engine_process", "false") as other:
        mine, theirs = (d.post("/v1/completions", PROMPT).json()["choices"] for d in (daemon, other))
        assert mine == theirs


def test_the_engine_is_killed_under_a_running_request(random_model):
    with Daemon("--model", random_model) as other:
        with httpx.stream("POST", other.url + "/v1/completions", json=endless(), timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            assert other.get("/kv_cache")["utilized_kv_cache"] > 0
        other.wait_until_idle()

        # the engine dies under a running request: it gets an error, later ones a 503, and nothing hangs
        children = subprocess.run(
            ["pgrep", "-P", str(other.process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()  # fmt: skip
        with httpx.stream("POST", other.url + "/v1/completions", json=endless(), timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            for child in children:
                os.kill(int(child), signal.SIGKILL)
            rest = [line for line in lines if line]
        assert '"error"' in rest[-1]
        assert httpx.get(other.url + "/health").status_code == 503
        refused = other.post("/v1/completions", PROMPT)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_dead"


def test_a_signal_to_the_whole_group_still_leaves_time_to_finish(random_model):
    with Daemon("--model", random_model) as daemon:
        url = daemon.url + "/v1/completions"
        with httpx.stream("POST", url, json=endless(max_tokens=200), timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            children = subprocess.run(["pgrep", "-P", str(daemon.process.pid)], capture_output=True, text=True, check=True)
            for pid in [daemon.process.pid, *map(int, children.stdout.split())]:
                os.kill(pid, signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"


@pytest.mark.parametrize("process", ["true", "false"])
def test_told_to_stop_it_ends_although_a_client_streams(random_model, process):
    daemon = Daemon("--model", random_model, "--engine_process", process)
    body = endless(max_tokens=1900, n=64)
    with daemon, httpx.stream("POST", daemon.url + "/v1/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        daemon.process.terminate()
        rest = [line for line in lines if line]
        assert '"error"' in rest[-1]
        assert "shutting down" in rest[-1]
        assert daemon.process.wait(20) in (0, -signal.SIGTERM)
    assert not any("Traceback" in line for line in daemon.log), "\n".join(daemon.log)


def test_a_port_that_is_taken_is_one_sentence(daemon, random_model):
    port = daemon.url.rsplit(":", 1)[1]
    second = Daemon("--model", random_model, "--port", port)
    assert second.process.wait(60) == 2
    second._reader.join(5)
    assert "can't listen" in second.log[-1]


def test_what_the_start_tells(random_model):
    with Daemon("--model", random_model, "--host", "0.0.0.0") as daemon:
        log = "\n".join(daemon.log)
    for words in (
        "weights on cpu",
        "Attention: ",
        " in bfloat16",
        "pages of 16 tokens",
        "fit",
        "Engine ready in",
        "--api_key",
    ):
        assert words in log
