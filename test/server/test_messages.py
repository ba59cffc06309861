"""Anthropic's Messages API through the real `anthropic` client; the same conversation as a chat says what is right."""

import json
from types import SimpleNamespace

import anthropic
import httpx
import openai
import pytest
from anthropic.lib.streaming._messages import accumulate_event

from simple_flashinfer.server.choices import ChatChoice
from simple_flashinfer.server.errors import ApiError
from simple_flashinfer.server.message_schemas import MessagesRequest
from simple_flashinfer.server.messages import _Message
from simple_flashinfer.server.respond import Answer
from simple_flashinfer.server.service import Piece
from simple_flashinfer.text.parsing.parser import make_parser
from simple_flashinfer.types import FinishReason
from test.daemon import Daemon

SYSTEM, HELLO = "Be brief.", [{"role": "user", "content": "Hello! 日本語?"}]
GREEDY = {"model": "demo", "max_tokens": 20, "extra_body": {"temperature": 0}}
TOOL = {
    "name": "get_weather",
    "description": "Tells the weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}


@pytest.fixture
def client(daemon):
    with anthropic.Anthropic(base_url=daemon.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def as_chat(daemon):
    with openai.OpenAI(base_url=daemon.url + "/v1", api_key="none", max_retries=0) as client:
        yield lambda messages, **more: client.chat.completions.create(
            model="demo", messages=messages, temperature=0, max_tokens=20, **more
        )


@pytest.fixture(scope="module")
def guarded(random_model):
    """A daemon that knows a format of tool calls, and a key."""
    flags = [
        "--model",
        random_model,
        "--served_model_name",
        "demo",
        "--torch_dtype",
        "float32",
        "--tool_call_parser",
        "hermes",
    ]
    with Daemon(*flags, env={"API_KEY": "sesame"}) as running:
        yield running


@pytest.fixture
def caller(guarded):
    with anthropic.Anthropic(base_url=guarded.url, api_key="sesame", max_retries=0) as client:
        yield client


def text_of(message):
    return "".join(block.text for block in message.content)


def said(message):
    """What does not differ from one answer to another."""
    return message.model_dump(include={"content", "stop_reason", "stop_sequence"})


def test_a_message_is_what_a_chat_says(client, as_chat):
    expected = as_chat([{"role": "system", "content": SYSTEM}, *HELLO])
    answer = client.messages.create(system=SYSTEM, messages=HELLO, **GREEDY)
    assert [block.to_dict() for block in answer.content] == [{"type": "text", "text": expected.choices[0].message.content}]
    assert (answer.type, answer.role, answer.model, answer.stop_reason) == ("message", "assistant", "demo", "max_tokens")
    assert answer.id.startswith("msg_")
    usage = answer.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == expected.usage.prompt_tokens
    assert (usage.output_tokens, usage.cache_creation_input_tokens) == (20, 0)


def test_blocks_say_the_same_as_strings(client):
    def block(text):
        return {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}

    plain = client.messages.create(system=SYSTEM, messages=HELLO, **GREEDY)
    blocks = client.messages.create(
        system=[block("Be "), block("brief.")],
        messages=[{"role": "user", "content": [block("Hello! "), block("日本語?")]}],
        metadata={"user_id": "x"},
        service_tier="auto",
        **GREEDY,
    )
    assert said(blocks) == said(plain)


def test_streamed(client):
    whole = client.messages.create(messages=HELLO, **GREEDY)
    with client.messages.stream(messages=HELLO, **GREEDY) as stream:
        kinds = [event.type for event in stream if event.type not in ("text", "content_block_delta")]
        streamed = stream.get_final_message()
    assert said(streamed) == said(whole)
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    assert kinds == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]


def test_events_have_names(daemon):
    body = {"model": "demo", "max_tokens": 2, "messages": HELLO, "stream": True}
    *events, end = daemon.post("/messages", body).text.split("\n\n")
    assert end == ""
    for event in events:
        name, data = event.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


def test_stop_sequences(client):
    text = text_of(client.messages.create(messages=HELLO, **GREEDY))
    stop = text[8:11]
    answer = client.messages.create(messages=HELLO, stop_sequences=["never", stop], **GREEDY)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert text_of(answer) == text[: text.index(stop)]
    with client.messages.stream(messages=HELLO, stop_sequences=["never", stop], **GREEDY) as stream:
        assert said(stream.get_final_message()) == said(answer)


def test_tokens_that_were_cached_are_counted_apart(client):
    messages = [{"role": "user", "content": "Count these words: " + "four five six " * 20}]
    first, second = (client.messages.create(messages=messages, **GREEDY).usage for _ in range(2))
    assert second.cache_read_input_tokens > first.cache_read_input_tokens
    count = client.messages.count_tokens(model="demo", messages=messages).input_tokens
    for usage in (first, second):
        assert usage.input_tokens + usage.cache_read_input_tokens == count


def test_the_assistants_last_message_is_continued(client, as_chat):
    messages = [*HELLO, {"role": "assistant", "content": "class"}]
    expected = as_chat(messages, extra_body={"continue_final_message": True})
    assert text_of(client.messages.create(messages=messages, **GREEDY)) == expected.choices[0].message.content


def test_turns_of_one_speaker_are_one(client):
    apart = [{"role": "user", "content": "One."}, {"role": "user", "content": "Two."}]
    together = [{"role": "user", "content": "One.\n\nTwo."}]
    assert said(client.messages.create(messages=apart, **GREEDY)) == said(
        client.messages.create(messages=together, **GREEDY)
    )


def test_a_forced_call_and_its_result(caller):
    request = {"messages": HELLO, "tools": [TOOL], **GREEDY, "max_tokens": 1000}  # much of it may be white space
    answer = caller.messages.create(tool_choice={"type": "any", "disable_parallel_tool_use": True}, **request)
    (call,) = answer.content
    assert (call.type, call.name, answer.stop_reason) == ("tool_use", TOOL["name"], "tool_use")
    assert call.input.keys() == {"city", "days"}
    assert call.input["city"] in ("Rome", "Oslo")
    named = {"type": "tool", "name": TOOL["name"], "disable_parallel_tool_use": True}  # the same: it is the only one
    with caller.messages.stream(tool_choice=named, **request) as stream:
        final = stream.get_final_message()
    assert (final.content[0].input, final.stop_reason) == (call.input, "tool_use")
    result = [
        {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rain"}], "is_error": True}
    ]
    history = [*HELLO, answer.to_param(), {"role": "user", "content": [*result, {"type": "text", "text": "And?"}]}]
    after = caller.messages.create(messages=history, tools=[TOOL], **GREEDY)
    assert after.stop_reason in ("end_turn", "max_tokens")
    count = caller.messages.count_tokens(model="demo", messages=history, tools=[TOOL]).input_tokens
    assert count == after.usage.input_tokens + after.usage.cache_read_input_tokens


CALLS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 1}}\n</tool_call>'
REPEATED = {"structured_outputs": {"choice": [f"{CALLS}\n" * 3]}}  # a model that would go on and on


def test_no_more_calls_than_are_wanted(guarded, caller):
    chat = {"model": "demo", "messages": HELLO, "tools": [{"type": "function", "function": {"name": "get_weather"}}]}
    with openai.OpenAI(base_url=guarded.url + "/v1", api_key="sesame", max_retries=0) as client:

        def call(**more):
            return client.chat.completions.create(**chat, temperature=0, max_tokens=1000, extra_body=REPEATED, **more)

        several, one = call(), call(parallel_tool_calls=False)
        assert len(several.choices[0].message.tool_calls) == 3
        (only,) = one.choices[0].message.tool_calls
        assert json.loads(only.function.arguments) == {"city": "Rome", "days": 1}
        assert one.choices[0].finish_reason == "tool_calls"
        assert one.usage.completion_tokens < several.usage.completion_tokens / 2
        chunks = list(call(parallel_tool_calls=False, n=2, stream=True, stream_options={"include_usage": True}))
        assert {c.index for chunk in chunks for ch in chunk.choices for c in ch.delta.tool_calls or ()} == {0}
        ends = [ch.finish_reason for chunk in chunks for ch in chunk.choices if ch.finish_reason]
        assert ends == ["tool_calls"] * 2
        assert chunks[-1].usage.completion_tokens == 2 * one.usage.completion_tokens
    headers = {"x-api-key": "sesame"}
    while httpx.get(guarded.url + "/kv_cache", headers=headers).json()["utilized_kv_cache"]:
        pass  # what was left of the answers is not generated for nobody


def test_what_the_chat_template_gets():
    request = MessagesRequest.model_validate({
        "model": "demo", "max_tokens": 2000, "system": "S", "thinking": {"type": "enabled", "budget_tokens": 1024},
        "messages": [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "T", "signature": ""}, {"type": "redacted_thinking", "data": "?"},
                {"type": "text", "text": "A"}, {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": "R", "is_error": True}, {"type": "text", "text": "U"},
            ]},
        ],
    })  # fmt: skip
    chat = request.for_chat()
    assert chat.template_messages() == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {
            "role": "assistant",
            "content": "A",
            "reasoning_content": "T",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "Error: R", "tool_call_id": "1"},
        {"role": "user", "content": "U"},
    ]
    assert chat.template_kwargs() == {"enable_thinking": True, "add_generation_prompt": True}


def test_output_config(client):
    schema = {"type": "object", "properties": {"city": {"const": "Rome"}}, "required": ["city"]}
    schema["additionalProperties"] = False
    wanted = {"effort": "max", "format": {"type": "json_schema", "schema": schema}}
    answer = client.messages.create(messages=HELLO, output_config=wanted, **{**GREEDY, "max_tokens": 1000})
    assert json.loads(text_of(answer)) == {"city": "Rome"}
    chat = MessagesRequest.model_validate({"model": "demo", "max_tokens": 1, "messages": HELLO, "output_config": wanted})
    assert chat.for_chat().template_kwargs()["reasoning_effort"] == "xhigh"


def test_the_system_may_speak_in_between(client, as_chat):
    messages = [*HELLO, {"role": "system", "content": [{"type": "text", "text": SYSTEM}]}, *HELLO]
    expected = as_chat([*HELLO, {"role": "system", "content": SYSTEM}, *HELLO]).choices[0].message.content
    assert text_of(client.messages.create(messages=messages, **GREEDY)) == expected


def test_what_asks_for_nothing(client):
    nothing = {"container": None, "diagnostics": None, "inference_geo": None, "speed": "standard", "user_profile_id": "x"}
    tools = [{**TOOL, "allowed_callers": ["direct"], "defer_loading": False, "input_examples": []}]
    plain = client.messages.create(messages=HELLO, tools=[TOOL], **GREEDY)
    more = {"temperature": 0, **nothing}
    assert said(client.messages.create(messages=HELLO, tools=tools, **{**GREEDY, "extra_body": more})) == said(plain)


async def test_thinking_may_be_left_out():
    for streamed in (False, True):
        message, pieces = message_of("<think>Well.</think>Yes.", 5)
        message._shows_thinking = False
        told = await events_of(message, pieces) if streamed else await message.whole(numbered(pieces))
        assert "Well" not in json.dumps(told)
        assert [(block["type"]) for block, _ in message._blocks] == ["thinking", "text"]


def message_of(text, size):
    """The answer that a model would give with this text, in pieces of so many characters."""
    tools = [{"type": "function", "function": {"name": "f"}}]
    parser = make_parser("hermes", "think", tools=tools)
    choice = ChatChoice(None, tool_named=False, token_ids=False)
    service = SimpleNamespace(config=SimpleNamespace(model_name="demo"))
    message = _Message(service, Answer(SimpleNamespace(prompt_token_ids=[1, 2, 3]), choice))
    pieces = []
    for part in [*(text[at : at + size] for at in range(0, len(text), size)), ""]:
        parser.feed(part, final=not part)
        pieces.append(Piece(part, [0], finish_reason=None if part else FinishReason.STOP, parsed=parser.out.take()))
    pieces[0].num_cached_tokens = 2
    return message, pieces


async def numbered(pieces):
    for piece in pieces:
        if isinstance(piece, Exception):
            raise piece
        yield 0, piece


async def events_of(message, pieces):
    source = numbered(pieces)
    return [json.loads(event.partition(b"data: ")[2]) async for event in message.events(await anext(source), source)]


CALL = '<tool_call>{"name": "f", "arguments": {"x": [1, "two"]}}</tool_call>'


@pytest.mark.parametrize("size", [1, 3, 17, 1000])
async def test_the_blocks_of_an_answer(size):
    text = f"<think>Well.</think>Let me see.\n{CALL}\n{CALL}"
    message, pieces = message_of(text, size)
    whole = await message.whole(numbered(pieces))
    assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use", "tool_use"]
    thinking, content, *calls = whole["content"]
    assert (thinking["thinking"].strip(), content["text"]) == ("Well.", "Let me see.")
    assert [call["input"] for call in calls] == [{"x": [1, "two"]}] * 2
    assert whole["stop_reason"] == "tool_use"
    assert whole["usage"]["input_tokens"] == 1

    buffers, snapshot = {}, None
    for event in await events_of(*message_of(text, size)):
        snapshot = accumulate_event(event=event, current_snapshot=snapshot, json_bufs=buffers)
    ids_apart = [{**block, "id": None} for block in whole["content"]]  # they are drawn anew
    assert [{**block.to_dict(), "id": None} for block in snapshot.content] == ids_apart
    assert snapshot.stop_reason == "tool_use"


@pytest.mark.parametrize("size", [1, 40, 1000])
async def test_text_after_a_call(size):
    whole = await message_of(f"{CALL}\nDone.", size)[0].whole(numbered(message_of(f"{CALL}\nDone.", size)[1]))
    assert sorted(block["type"] for block in whole["content"]) == ["text", "tool_use"]
    assert next(block["input"] for block in whole["content"] if block["type"] == "tool_use") == {"x": [1, "two"]}


@pytest.mark.parametrize(
    ("arguments", "given"),
    [('{"x": 1, "y": [2', {"x": 1, "y": [2]}), ('{"x": nonsense}', None), ("[1]", None), ('{"x": NaN}', None)],
)
async def test_arguments_that_are_no_object(arguments, given):
    message, pieces = message_of('<tool_call>{"name": "f", "arguments": ' + arguments, 5)
    (call,) = (await message.whole(numbered(pieces)))["content"]
    assert call["input"] == (given or {"arguments": arguments})


async def test_a_failure_on_the_way_is_the_last_event():
    message, pieces = message_of("Let me see.", 3)
    events = await events_of(message, [*pieces[:2], ApiError(500, "The engine failed."), *pieces[2:]])
    assert events[-1] == {"type": "error", "error": {"type": "api_error", "message": "The engine failed."}}
    assert [event["type"] for event in events[:2]] == ["message_start", "content_block_start"]


def user(*blocks):
    return {"messages": [{"role": "user", "content": list(blocks)}]}


CALLED = {"type": "tool_use", "id": "1", "name": "f", "input": {}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 100_000}, "max_tokens|messages"),
        ({"temperature": 1.5}, "temperature: .*1"),
        ({"stop_sequences": [""]}, "stop_sequences.0"),
        ({"presence_penalty": 1}, "presence_penalty: Extra"),
        ({"messages": []}, "messages"),
        (user({"type": "image", "source": {}}), "messages.0.content.0: .*no images"),
        (user({"type": []}), "messages.0.content.0: .*no images"),
        (user({"type": "text", "text": 3}), "messages.0.content.0.*text: "),
        (user({"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image"}]}), "content.0.type: .*text only"),
        (user(CALLED), "messages.0.content.0: .*tool_use"),
        ({"messages": [*HELLO, {"role": "assistant", "content": [CALLED]}]}, "messages.1: .*continued"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}]}, "tools.0.type: .*web_search"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "output_config.format: .*not"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"container": "c"}, "container"),
        ({"speed": "fast"}, "speed: .*standard"),
        ({"messages": [{"role": "system", "content": [CALLED]}, *HELLO]}, "messages.0.content.0: .*system"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens"),
        ({"tools": [TOOL], "tool_choice": {"type": "any"}}, "tool_choice: .*--tool_call_parser"),
    ],
)
def test_errors_have_anthropics_form_and_name_the_field(client, change, words):
    body = {"model": "demo", "max_tokens": 5, "messages": HELLO} | change
    with pytest.raises(anthropic.BadRequestError, match=words) as caught:
        client.post("/v1/messages", body=body, cast_to=object)
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"].keys() == {"type", "message"}
    assert caught.value.body["error"]["type"] == "invalid_request_error"


def test_other_errors(client, daemon):
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        client.messages.create(messages=HELLO, **{**GREEDY, "model": "claude"})
    assert httpx.get(daemon.url + "/v1/messages").json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(daemon.url + "/v1/messages/batches").json()["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.RequestTooLargeError, match="request_too_large"):
        client.messages.create(messages=[{"role": "user", "content": "[" * 100_000}], **GREEDY)
    assert httpx.post(daemon.url + "/v1/messages", content=b"{").json()["error"]["type"] == "invalid_request_error"
    assert "param" in httpx.get(daemon.url + "/v1/chat/completions").json()["error"]


def test_the_key_may_come_as_x_api_key(guarded, caller):
    assert caller.messages.count_tokens(model="demo", messages=HELLO).input_tokens
    with anthropic.Anthropic(base_url=guarded.url, api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            stranger.messages.count_tokens(model="demo", messages=HELLO)
        assert caught.value.body["error"]["type"] == "authentication_error"
