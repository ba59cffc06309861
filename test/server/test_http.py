"""What goes over the wire: the documented curl, errors that name the field, status pages."""

import gzip
import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

README = Path(__file__).parents[2] / "README.md"
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_the_documented_curl_as_it_stands(daemon, prefix):
    command = re.search(r"^curl -X 'POST' .*?}'$", README.read_text(), re.MULTILINE | re.DOTALL)
    command = command[0].replace("curl ", "curl -sS -i ", 1).replace("http://localhost:7088", daemon.url + prefix)
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    head, _, body = result.stdout.replace("\r\n", "\n").partition("\n\n")
    assert head.startswith("HTTP/1.1 200")
    assert "content-type: text/event-stream" in head
    *events, done, end = body.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert any(chunk["choices"][0]["delta"].get("content") for chunk in chunks)


@pytest.mark.parametrize("name", [None, "model", "demo"])
def test_names_of_the_model(daemon, name):
    assert daemon.post("/v1/chat/completions", {**CHAT, "model": name}).status_code == 200


def test_the_path_is_a_name_as_well(daemon, random_model):
    assert daemon.post("/chat/completions", {**CHAT, "model": random_model}).json()["model"] == "demo"


TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


def _allowed(mode, *names):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def _schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": -0.1}, "temperature", "0"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"top_p": 1.5}, "top_p", "1"),
        ({"top_k": 1.5}, "top_k", "integer"),
        ({"max_tokens": 0}, "max_tokens", "1"),
        ({"max_tokens": -3}, "max_tokens", "1"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "1"),
        ({"presence_penalty": 3}, "presence_penalty", "2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "0"),
        ({"seed": 2**64}, "seed", "integer"),
        ({"stop": [""]}, "stop", "empty"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "token ids"),
        ({"stream": "perhaps"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream is true"),
        ({"stream": True, "stream_options": {"what": 1}}, "stream_options.what", "not permitted"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Hello"}, "messages", "list"),
        ({"messages": [{"role": "pirate", "content": "Arr"}]}, "messages.0.role", "assistant"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
            "'image_url' is not supported: this server takes text only",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "messages.0.tool_calls.0.function",
            "",
        ),
        ({"n": 0}, "n", "1"),
        ({"n": 1000}, "n", "128"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs is true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"logit_bias": {"1": 500}}, "logit_bias", "100"),
        ({"logit_bias": {"one": 5}}, "logit_bias", "token ids"),
        ({"logit_bias": {"99999999": 5}}, "logit_bias", "outside"),
        ({"allowed_token_ids": [99999999]}, "allowed_token_ids", "outside"),
        ({"bad_words": [""]}, "bad_words", "characters"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "max_tokens"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "required"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools.0.function.name", "pattern"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": [TOOL]}, "tool_choice", "no tool 'f'"),
        ({"tool_choice": 5}, "tool_choice", "'none', 'auto' or 'required'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "required"),
        ({"tool_choice": {"type": "function", "function": {"name": 5}}}, "tool_choice.function.name", "string"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}, "a": 1}}, "tool_choice.a", "not permitted"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools", "required"),
        ({"tools": [TOOL], "tool_choice": _allowed("auto", "f")}, "tool_choice", "no tool 'f'"),
        ({"tools": [TOOL], "tool_choice": _allowed("auto")}, "tool_choice.allowed_tools.tools", "at least 1"),
        ({"tools": [TOOL], "tool_choice": _allowed("maybe", "f")}, "tool_choice.allowed_tools.mode", "required"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is missing"),
        ({"response_format": _schema({"type": "object", "not": {}})}, "response_format", "not"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"continue_final_message": True}, "continue_final_message", "assistant"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "must not have"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "1"),
        ({"best_off": 3}, "best_off", "not supported"),
        ({"n": True}, "n", "integer"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_tokens": "3"}, "max_tokens", "integer"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty", "0.01"),
        ({"stop": ["x"] * 33}, "stop", "32"),
        ({"stop": "x" * 300}, "stop", "256"),
        ({"stop_token_ids": list(range(200))}, "stop_token_ids", "128"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages.0.content",
            "valid string, or: Input should be a valid list",
        ),
    ],
)
def test_a_bad_value_is_a_400_that_names_the_field(daemon, change, param, words):
    response = daemon.post("/v1/chat/completions", {**CHAT, **change})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert error["code"]


def test_what_asks_for_nothing_is_accepted(daemon):
    neutral = {
        "n": 1, "logprobs": False, "top_logprobs": None, "logit_bias": {}, "tools": [], "tool_choice": "none", "user": "me",
        "response_format": {"type": "text"}, "top_p": 1, "top_k": -1, "min_p": 0, "presence_penalty": 0, "stop": None,
        "metadata": {"a": "b"}, "store": False, "unheard_of": None, "max_completion_tokens": 3, "length_penalty": 1.0,
    }  # fmt: skip
    response = daemon.post("/v1/chat/completions", {**CHAT, **neutral})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("content", [b"{", b"", b"null", b"[1]", b'{"messages": \xff}', b'"\\ud800"'])
def test_a_body_that_is_no_request(daemon, content):
    headers = {"Content-Type": "application/json"}
    response = httpx.post(daemon.url + "/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.json()["error"]["code"] == "invalid_json"


def test_a_body_that_is_not_sent_as_json(daemon):
    response = httpx.post(daemon.url + "/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_half_a_surrogate_pair_is_no_character(daemon, path):
    if path == "/v1/completions":
        body = b'{"prompt": "a \\ud800 b"}'
    else:
        body = b'{"messages": [{"role": "user", "content": "a \\ud800 b"}]}'
    response = httpx.post(daemon.url + path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert "surrogate" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "many words " * 3000}]}, "messages"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 5000}, "messages"),
        ("/v1/completions", {"prompt": [5] * 2048}, "prompt"),
        ("/v1/completions", {"prompt": "x" * 3_000_000}, "prompt"),
    ],
)
def test_too_long_says_both_numbers(daemon, path, body, param):
    response = daemon.post(path, body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    numbers = [int(number) for number in re.findall(r"\d+", error["message"])]
    assert numbers[0] == 2048
    assert numbers[1] >= 2048


@pytest.mark.parametrize("length", [2047, 2040])
def test_the_context_can_be_filled_to_its_last_token(daemon, length):
    body = {"prompt": [5] * length, "max_tokens": 2048 - length, "temperature": 0, "ignore_eos": True}
    response = daemon.post("/v1/completions", body)
    assert response.json()["usage"]["total_tokens"] == 2048


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"),
        ([], "empty"),
        ([[1]] * 200, "128"),
        ([99999], "outside"),
        ([-1], "outside"),
        ([2**70], "integer"),
        ([True], "valid"),
    ],
)
def test_prompts_that_can_not_be(daemon, prompt, words):
    response = daemon.post("/v1/completions", {"prompt": prompt})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("prompt")
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nope", 404), ("GET", "/v1/completions", 405)])
def test_wrong_addresses_have_the_same_kind_of_body(daemon, method, path, status):
    response = httpx.request(method, daemon.url + path)
    assert response.status_code == status
    assert response.json()["error"]["message"].startswith(f"{method} {path}: ")


def test_status_pages(daemon):
    daemon.wait_until_idle()
    cache = daemon.get("/kv_cache")
    assert cache["total_kv_cache"] == cache["free_kv_cache"] > 2048
    assert cache["utilized_kv_cache"] == 0
    assert daemon.get("/health") == {"status": "ok", "running": 0, "waiting": 0}
    assert daemon.get("/v1/models")["data"][0]["max_model_len"] == 2048
    assert httpx.get(daemon.url + "/v1/models/other").status_code == 404
    assert daemon.get("/")["model"] == "demo"
    assert "/v1/chat/completions" in daemon.get("/openapi.json")["paths"]


@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/v1/models/demo", "/docs", "/v1/models/other", "/nope"])
def test_head_is_get_without_its_body_and_a_last_slash_means_nothing(daemon, path):
    expected = httpx.get(daemon.url + path)
    for method, end in (("HEAD", ""), ("HEAD", "/"), ("GET", "/")):
        answer = httpx.request(method, daemon.url + path.rstrip("/") + end)
        assert answer.status_code == expected.status_code
        assert answer.headers["content-type"] == expected.headers["content-type"]
        assert bool(answer.content) == (method == "GET")
    assert httpx.head(daemon.url + "/v1/completions").status_code == 405
    assert daemon.post("/v1/chat/completions/", CHAT).status_code == 200


def test_a_compressed_body_is_refused_clearly(daemon):
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    answer = httpx.post(
        daemon.url + "/v1/chat/completions", content=gzip.compress(json.dumps(CHAT).encode()), headers=headers
    )
    assert answer.status_code == 415
    assert "Content-Encoding gzip" in answer.json()["error"]["message"]
    headers["Content-Encoding"] = "identity"
    answer = httpx.post(daemon.url + "/v1/chat/completions", content=json.dumps(CHAT), headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "change",
    [
        {"verbosity": "medium"},
        {"messages": [{"role": "assistant", "content": "Hi", "provider_specific_fields": {"refusal": None}}]},
    ],
)
def test_what_clients_send_along_without_asking_for_anything(daemon, change):
    assert daemon.post("/v1/chat/completions", {**CHAT, **change}).status_code == 200


@pytest.mark.parametrize(
    "said",
    [
        {"content": None, "refusal": "No."},
        {"content": [{"type": "refusal", "refusal": "No."}]},
        {"content": [{"type": "text", "text": "No"}, {"type": "refusal", "refusal": "."}]},
    ],
)
def test_a_refusal_is_what_the_assistant_said(daemon, said):
    def talk(said):
        return [{"role": "user", "content": "x"}, {"role": "assistant", **said}, {"role": "user", "content": "y"}]

    plain, refused = (daemon.post("/tokenize", {"messages": talk(m)}).json() for m in ({"content": "No."}, said))
    assert plain == refused


def test_refusals_in_responses(daemon):
    def tokens(content):
        items = [{"role": "assistant", "content": content}, {"role": "user", "content": "y"}]
        return daemon.post("/v1/responses", {"input": items, "max_output_tokens": 1}).json()["usage"]["input_tokens"]

    assert tokens([{"type": "refusal", "refusal": "No, never."}]) == tokens("No, never.") > tokens("")
