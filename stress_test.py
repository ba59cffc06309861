"""Stress test with locust: many clients of different kinds at once.

    locust -f stress_test.py -H http://localhost:7088 -r 10 -u 50 -t 60
    locust -f stress_test.py -H http://localhost:7088 -r 10 -u 50 -t 60 --headless

Beside locust's own rows, whose time is that until an answer begins, there are rows of type TTFT (milliseconds to the first
token), whole (milliseconds to the last one) and tok/s (here the "time" is a rate: tokens a second of one stream after its
first token). API_KEY in the environment is sent along.
"""

import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from locust import HttpUser, between, task

_WORDS = "river stone cloud garden window letter music winter table harbor candle forest mirror".split()  # noqa: SIM905
_HEADERS = {"Authorization": f"Bearer {os.environ['API_KEY']}"} if os.environ.get("API_KEY") else {}


def text(num_words: int) -> str:
    return " ".join(random.choices(_WORDS, k=num_words))


class Client(HttpUser):
    wait_time = between(0, 0.5)

    @task(6)
    def streamed_chat(self) -> None:
        self._stream("/v1/chat/completions", {**self._chat(20), "max_tokens": 64}, "chat, streamed")

    @task(2)
    def whole_chat(self) -> None:
        body = {**self._chat(20), "max_tokens": 32}
        with self._post("/v1/chat/completions", body, "chat, whole") as response:
            if response.status_code == 200 and not response.json()["usage"]["completion_tokens"]:
                response.failure("no tokens")

    @task(2)
    def completion(self) -> None:
        self._stream("/v1/completions", {"prompt": text(30), "max_tokens": 48}, "completion, streamed")

    @task(1)
    def long_prompt(self) -> None:
        self._stream("/v1/chat/completions", {**self._chat(250), "max_tokens": 16}, "chat, long prompt")

    @task(1)
    def leaves_early(self) -> None:
        self._stream("/v1/chat/completions", {**self._chat(20), "max_tokens": 256}, "chat, left early", leave_after=5)

    def _chat(self, num_words: int) -> dict[str, Any]:
        return {"model": "model", "messages": [{"role": "user", "content": text(num_words)}], "temperature": 0.9}

    @contextmanager
    def _post(self, path: str, body: dict[str, Any], name: str, stream: bool = False) -> Iterator[Any]:
        arguments = {"json": body, "name": name, "headers": _HEADERS, "stream": stream, "catch_response": True}
        with self.client.post(path, **arguments) as response:
            if response.status_code == 503:
                response.success()  # a full queue is an answer; the client comes back
                time.sleep(float(response.headers.get("Retry-After", 1)))
            elif response.status_code != 200:
                response.failure(f"{response.status_code}: {response.text[:200]}")
            yield response

    def _stream(self, path: str, body: dict[str, Any], name: str, leave_after: int | None = None) -> None:
        start = time.perf_counter()
        first = None
        count, done = 0, False
        with self._post(
            path, {**body, "stream": True, "stream_options": {"include_usage": True}}, name, stream=True
        ) as response:
            if response.status_code != 200:
                return
            for line in response.iter_lines():
                data = line.decode() if isinstance(line, bytes) else line
                if data.startswith('data: {"error"'):
                    response.failure(data[6:206])
                    return
                if data == "data: [DONE]":
                    done = True
                elif data.startswith("data: "):
                    chunk = json.loads(data[6:])
                    if chunk.get("usage"):
                        count = chunk["usage"]["completion_tokens"]
                    elif first is None and _text_of(chunk):
                        first = time.perf_counter()
                        self._fire("TTFT", name, (first - start) * 1e3)
                    count += not chunk.get("usage")
                    if leave_after is not None and count >= leave_after:
                        response.close()  # in the middle of the answer
                        return
            if not done:
                response.failure("the stream ended without [DONE]")
                return
            self._fire("whole", name, (time.perf_counter() - start) * 1e3)
            if first is not None and (seconds := time.perf_counter() - first) > 0:
                self._fire("tok/s", name, count / seconds)

    def _fire(self, kind: str, name: str, value: float) -> None:
        self.environment.events.request.fire(
            request_type=kind, name=name, response_time=value, response_length=0, exception=None, context={}
        )


def _text_of(chunk: dict[str, Any]) -> str:
    choice = chunk["choices"][0]
    return choice.get("text") or choice.get("delta", {}).get("content") or ""
