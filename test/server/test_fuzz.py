"""What nobody sends by accident: each gets an answer that blames the client, soon, and no other client notices."""

import json
import socket
import threading
import time

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simple_flashinfer.server.schemas import ChatCompletionRequest, CompletionRequest
from simple_flashinfer.server.tokens import TokenizeRequest

CHAT, COMPLETIONS, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
JSON = {"Content-Type": "application/json"}
SECONDS = 2  # generous: nearly all take less than 50 ms
MAX_ANSWER = 2048  # bytes

DEEP = 100_000
LONG = "x" * 10_000_000
MANY = 1_000_000


def chat(fields: str) -> str:
    return '{"max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}], ' + fields + "}"


def tool(parameters: str) -> str:
    return chat('"tools": [{"type": "function", "function": {"name": "f", "parameters": ' + parameters + "}}]")


def schema(text: str) -> str:
    return chat('"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": ' + text + "}}")


def outputs(text: str) -> str:
    return chat('"structured_outputs": {' + text + "}")


def messages(*after: str) -> str:
    return '{"messages": [{"role": "user", "content": "Hi"}, ' + ", ".join(after) + "]}"


def many(element: str, count: int = MANY) -> str:
    return "[" + ", ".join([element] * count) + "]"


def nested(opening: str, inner: str, closing: str, depth: int = DEEP) -> str:
    return opening * depth + inner + closing * depth


DEEP_LIST, DEEP_OBJECT = nested("[", "", "]"), nested('{"a": ', "1", "}")
HALF = '"\\ud800"'  # of a surrogate pair

HOSTILE = {
    "deep messages": (CHAT, '{"messages": ' + DEEP_LIST + "}"),
    "deep tool": (CHAT, tool(DEEP_OBJECT)),
    "deep tool that parses": (CHAT, tool(nested('{"a": ', "1", "}", 900))),
    "deep schema": (CHAT, schema(DEEP_OBJECT)),
    "deep schema that parses": (CHAT, schema(nested('{"items": ', "{}", "}", 900))),
    "deep schema as text": (CHAT, outputs(f'"json": {json.dumps(DEEP_OBJECT)}')),
    "deep template argument": (CHAT, chat(f'"chat_template_kwargs": {{"a": {DEEP_LIST}}}')),
    "deep template argument that parses": (CHAT, chat(f'"chat_template_kwargs": {{"a": {nested("[", "", "]", 900)}}}')),
    "deep tool call": (
        CHAT,
        messages(
            f'{{"role": "assistant", "tool_calls": [{{"function": {{"name": "f", "arguments": {json.dumps(DEEP_LIST)}}}}}]}}'
        ),
    ),
    "deep unknown field": (CHAT, chat(f'"foo": {DEEP_LIST}')),
    "deep prompt": (COMPLETIONS, f'{{"prompt": {DEEP_LIST}}}'),
    "deep text to tokenize": (TOKENIZE, f'{{"prompt": {DEEP_LIST}}}'),
    "only openings": (CHAT, "[" * 1_000_000),
    "a long integer": (CHAT, chat('"seed": 1' + "0" * 400)),
    "a longer integer": (CHAT, chat('"metadata": 1' + "0" * 5000)),
    "a long token id": (COMPLETIONS, '{"prompt": [1' + "0" * 400 + "]}"),
    "a long token id in a bias": (CHAT, chat('"logit_bias": {"1' + "0" * 5000 + '": 1}')),
    "an infinite number": (CHAT, chat('"temperature": 1e999')),
    "an infinite number in a schema": (CHAT, schema('{"maximum": 1e999}')),
    "NaN": (CHAT, chat('"presence_penalty": NaN')),
    "NaN in a tool": (CHAT, tool('{"a": NaN}')),
    "Infinity": (COMPLETIONS, '{"prompt": "x", "top_p": Infinity}'),
    "a long message": (CHAT, messages(f'{{"role": "user", "content": "{LONG}"}}')),
    "a long role": (CHAT, messages(f'{{"role": "{LONG}", "content": ""}}')),
    "a long model": (CHAT, chat(f'"model": "{LONG}"')),
    "a long number": (CHAT, chat(f'"seed": "{LONG}"')),
    "a long name of a field": (CHAT, chat(f'"{LONG}": 1')),
    "a long stop": (CHAT, chat(f'"stop": "{LONG}"')),
    "a long bad word": (CHAT, chat(f'"bad_words": ["{LONG}"]')),
    "a long description": (CHAT, tool("{}").replace('"name"', f'"description": "{LONG}", "name"')),
    "a long regex": (CHAT, outputs(f'"regex": "{LONG}"')),
    "a regex that is shown": (CHAT, outputs('"regex": "(' + LONG[:200_000] + '"')),
    "a long choice": (CHAT, outputs(f'"choice": ["{LONG}"]')),
    "a long name in a schema": (CHAT, schema(f'{{"properties": {{"{LONG}": {{"nullable": true}}}}}}')),
    "a long type in a schema": (CHAT, schema('{"type": "' + LONG[:200_000] + '"}')),
    "a long text to tokenize": (TOKENIZE, f'{{"prompt": "{LONG}"}}'),
    "too many bytes": (CHAT, chat(f'"user": "{LONG}{LONG}"')),
    "many messages": (CHAT, f'{{"messages": {many("1")}}}'),
    "many empty messages": (CHAT, messages(*['{"role": "user", "content": ""}'] * 200_000)),
    "a few thousand empty messages": (CHAT, messages(*['{"role": "user", "content": ""}'] * 5_000)),
    "many parts": (
        CHAT, messages('{"role": "user", "content": ' + many('{"type": "text", "text": ""}', 200_000) + "}")
    ),
    "many token ids": (COMPLETIONS, f'{{"prompt": {many("1")}}}'),
    "as many token ids as may be": (COMPLETIONS, f'{{"prompt": {many("1", 200_000)}}}'),
    "many fractions for token ids": (COMPLETIONS, f'{{"prompt": {many("1.5", 200_000)}}}'),
    "many prompts": (COMPLETIONS, f'{{"prompt": {many(chr(34) * 2, 200_000)}}}'),
    "many lists of token ids": (COMPLETIONS, f'{{"prompt": {many("[1]", 10_000)}}}'),
    "many stops": (CHAT, chat(f'"stop": {many("1")}')),
    "many wrong stops": (CHAT, chat(f'"stop": {many("1", 200_000)}')),
    "many biases": (CHAT, chat('"logit_bias": {' + ", ".join(f'"{i}": 1' for i in range(16_000)) + "}")),
    "many required": (CHAT, schema(f'{{"required": {many(chr(34) * 2, 200_000)}}}')),
    "many values in a tool": (CHAT, tool(f'{{"enum": {many("1", 200_000)}}}')),
    "many fields": (CHAT, chat(", ".join(f'"k{i}": null' for i in range(MANY)))),
    "many lists": (CHAT, chat(f'"foo": {many("[]")}')),
    "half a pair in a bad word": (CHAT, chat(f'"bad_words": [{HALF}]')),
    "half a pair in a regex": (CHAT, outputs(f'"regex": {HALF}')),
    "half a pair in a schema as text": (CHAT, outputs('"json": "{\\"enum\\": [\\"\\\\ud800\\"]}"')),
    "half a pair in a pointer": (CHAT, outputs('"json": "{\\"properties\\": {\\"\\\\ud800\\": {\\"nullable\\": true}}}"')),
    "half a pair in a stop": (CHAT, chat(f'"stop": {HALF}')),
    "half a pair in a name": (CHAT, chat(f"{HALF}: 1")),
    "half a pair to tokenize": (TOKENIZE, f'{{"prompt": {HALF}}}'),
    "no UTF-8": (CHAT, b'{"messages": "\xff\xfe"}'),
    "UTF-16": (CHAT, chat('"n": 1').encode("utf-16")),
    "a second value": (CHAT, chat('"n": 1, "n": "2"')),
    "only spaces": (CHAT, " " * 10_000_000),
    "nothing": (CHAT, b""),
    "a template of one's own": (TOKENIZE, messages('{"role": "user", "content": ""}')[:-1] + (
        ', "chat_template_kwargs": {"chat_template": "{% for i in range(9 ** 9) %}{% endfor %}"}}'
    )),
    "arguments of the server's own": (CHAT, chat('"chat_template_kwargs": {"self": 1}')),
    "messages as template arguments": (TOKENIZE, messages('{"role": "user", "content": ""}')[:-1] + (
        ', "chat_template_kwargs": {"messages": [], "self": 1}}'
    )),
}  # fmt: skip


def expect_blame(response: httpx.Response, seconds: float = 0) -> None:
    assert 400 <= response.status_code < 500, response.text[:500]
    assert len(response.content) < MAX_ANSWER
    assert response.json()["error"]["message"]
    assert seconds < SECONDS


@pytest.fixture(scope="module")
def neighbour(daemon):
    """A client that streams all the time; in the end, it must have got the same as alone."""
    body = {"prompt": "def main", "temperature": 0, "max_tokens": 300, "ignore_eos": True, "stream": True}

    def text():
        with httpx.stream("POST", daemon.url + COMPLETIONS, json=body, timeout=60) as response:
            events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert events.pop() == "[DONE]"
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    alone, texts, done = text(), [], threading.Event()

    def listen():
        while not done.is_set():
            texts.append(text())

    thread = threading.Thread(target=listen)
    thread.start()
    yield
    done.set()
    thread.join(60)
    assert texts
    assert set(texts) == {alone}


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_is_blamed_on_the_client(daemon, name):
    path, body = HOSTILE[name]
    content = body.encode() if isinstance(body, str) else body
    start = time.perf_counter()
    response = httpx.post(daemon.url + path, content=content, headers=JSON, timeout=60)
    expect_blame(response, time.perf_counter() - start)


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x", ""])
def test_another_content_type(daemon, content_type):
    headers = {"Content-Type": content_type}
    expect_blame(httpx.post(daemon.url + CHAT, content=chat('"n": 1'), headers=headers))


@pytest.mark.usefixtures("neighbour")
def test_a_body_without_a_length_is_limited_too(daemon):
    chunk, sent = b" " * 2**20, 0

    def chunks():
        nonlocal sent
        while sent < 40:
            sent += 1
            yield chunk

    response = httpx.post(daemon.url + CHAT, content=chunks(), headers=JSON, timeout=60)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


@pytest.mark.usefixtures("neighbour")
def test_more_token_ids_than_can_be_looked_at_in_passing(daemon):
    """As many as fit into the context are always taken, and some prompts at once."""
    answers = [
        httpx.post(daemon.url + COMPLETIONS, json={"prompt": [[5] * 2000] * count, "max_tokens": 100}, timeout=60)
        for count in (66, 67, 2000)
    ]
    assert [answer.status_code for answer in answers] == [400, 413, 413]
    assert [answer.json()["error"]["code"] for answer in answers] == ["context_length_exceeded", *["request_too_large"] * 2]
    assert "values" in answers[1].json()["error"]["message"]


@pytest.mark.usefixtures("neighbour")
def test_a_length_that_is_too_much_is_refused_before_the_body_is_read(daemon):
    host, port = daemon.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {2**40}\r\n\r\n{{"
        connection.sendall(head.encode())
        assert connection.recv(12) == b"HTTP/1.1 413"


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # half surrogate pairs as well
NUMBERS = st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, -(10**400), 1e308, -0.0]) | st.integers() | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize(
    ("path", "model", "base"),
    [
        (CHAT, ChatCompletionRequest, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}),
        (COMPLETIONS, CompletionRequest, {"prompt": "Hi", "max_tokens": 1}),
        (TOKENIZE, TokenizeRequest, {"prompt": "Hi"}),
    ],
)
def test_any_value_of_any_field(daemon, path, model, base):
    names = st.sampled_from(sorted(model.model_fields)) | ANY_TEXT

    with httpx.Client(base_url=daemon.url, timeout=60) as client:

        @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(st.dictionaries(names, VALUES, min_size=1, max_size=2))
        def fuzz(fields):
            body = json.dumps({**base, **fields, "max_tokens": 1} if path != TOKENIZE else {**base, **fields})
            response = client.post(path, content=body, headers=JSON)
            if response.status_code != 200:
                expect_blame(response)

        fuzz()
