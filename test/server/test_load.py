"""Many clients at once, some of whom leave: the others notice nothing, and no page is lost."""

import asyncio
import json
import time

import httpx
import pytest

CLIENTS, LEAVERS, TOKENS = 64, 8, 40


def body(index, **more):
    text = f"Tell me about the number {index}. " * (1 + index % 9)
    return {
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        **more,
    }


async def stream(client, url, index, leave_after=None):
    text, count = "", 0
    async with client.stream("POST", url + "/v1/chat/completions", json=body(index, stream=True)) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                count += 1
                if leave_after and count >= leave_after:
                    return None
    return text


async def test_streaming_clients_eight_of_whom_leave(daemon):
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        alone = {}
        for index in range(0, CLIENTS, 4):
            response = await client.post(daemon.url + "/v1/chat/completions", json=body(index))
            alone[index] = response.json()["choices"][0]["message"]["content"]
        together = [
            stream(client, daemon.url, index, leave_after=3 if index % CLIENTS < LEAVERS else None)
            for index in [*range(1, 1 + CLIENTS - 16), *alone]
        ]
        indices = [*range(1, 1 + CLIENTS - 16), *alone]
        texts = dict(zip(indices[LEAVERS:], (await asyncio.gather(*together))[LEAVERS:], strict=True))
    checked = [index for index in alone if texts.get(index) is not None]
    assert len(checked) >= 12
    for index in checked:
        assert texts[index] == alone[index]
    assert all(text for index, text in texts.items() if index >= LEAVERS)
    daemon.wait_until_idle()
    assert daemon.get("/health") == {"status": "ok", "running": 0, "waiting": 0}


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_frees_its_pages_at_once(daemon, streaming):
    daemon.wait_until_idle()
    endless = {"prompt": "go on", "max_tokens": 2000, "ignore_eos": True, "stream": streaming}
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=httpx.Timeout(5, read=0.3)) as client:  # noqa: PT012
        if streaming:
            with client.stream("POST", daemon.url + "/v1/completions", json=endless) as response:
                for _ in response.iter_lines():
                    assert daemon.get("/kv_cache")["utilized_kv_cache"] > 0
                    raise httpx.ReadTimeout("left")
        client.post(daemon.url + "/v1/completions", json=endless)
    start = time.monotonic()
    daemon.wait_until_idle()
    assert time.monotonic() - start < 5, "it was not generated to its end"


def test_two_thousand_tokens_for_one_take_nothing_from_another(daemon):
    """A long prompt that comes while another request streams: both end as they do alone."""
    long = {"prompt": [7 + i % 900 for i in range(2000)], "max_tokens": 4, "temperature": 0}
    short = {"prompt": "def", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    alone = [daemon.post("/v1/completions", request).json()["choices"][0]["text"] for request in (long, short)]

    async def together():
        async with httpx.AsyncClient(timeout=60) as client:
            answers = await asyncio.gather(*(client.post(daemon.url + "/v1/completions", json=r) for r in (long, short)))
            return [answer.json()["choices"][0]["text"] for answer in answers]

    assert asyncio.run(together()) == alone
