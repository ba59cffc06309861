"""The Responses API, seen through the real `openai` client."""

import json

import httpx
import openai
import pytest
from openai.types.responses import Response

from simple_flashinfer.server.choices import ChatChoice
from simple_flashinfer.server.response_output import ResponseOutput
from simple_flashinfer.server.response_store import ResponseStore, StoredResponse
from simple_flashinfer.server.service import Piece
from simple_flashinfer.text.parsing.parser import make_parser
from simple_flashinfer.types import FinishReason
from test.daemon import Daemon

GREEDY = {"model": "demo", "temperature": 0, "max_output_tokens": 8}
QUESTION = "class Request: def main(self)"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "name": "lookup",
    "description": None,
    "parameters": {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}},
        "required": ["kind"],
        "additionalProperties": False,
    },
    "strict": True,
}
FORCED = {"model": "demo", "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "temperature": 0}


@pytest.fixture(scope="module")
def client(random_model):
    """Of a daemon that knows a format of tool calls."""
    flags = ("--model", random_model, "--served_model_name", "demo", "--torch_dtype", "float32")
    with (
        Daemon(*flags, "--tool_call_parser", "hermes", "--reasoning_parser", "none") as daemon,
        openai.OpenAI(base_url=daemon.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def without_ids(response):
    """What two answers to the same request have in common."""
    if isinstance(response, list):
        return [without_ids(item) for item in response]
    if not isinstance(response, dict):
        return response
    passing = ("id", "call_id", "created_at", "completed_at", "input_tokens_details")
    return {name: without_ids(value) for name, value in response.items() if name not in passing}


def streamed(client, **arguments):
    """Events, checked against what they say of each other."""
    events = list(client.responses.create(stream=True, **arguments))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    final = events[-1].response
    assert events[-1].type == f"response.{final.status}"
    assert {event.response.id for event in (*events[:2], events[-1])} == {final.id}
    assert [e.item for e in events if e.type == "response.output_item.done"] == final.output
    for index, item in enumerate(final.output):
        own = [event for event in events if getattr(event, "output_index", None) == index]
        text = "".join(event.delta for event in own if event.type.endswith(".delta"))
        assert own[0].type == "response.output_item.added"
        assert own[0].item.id == item.id
        assert text == (item.arguments if item.type == "function_call" else item.content[0].text)
    return events


def test_an_answer_is_that_of_a_chat_completion(client):
    response = client.responses.create(input=QUESTION, instructions="Be brief.", **GREEDY)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=8)
    assert response.output_text == chat.choices[0].message.content
    assert (response.usage.input_tokens, response.usage.output_tokens) == (chat.usage.prompt_tokens, 8)
    assert response.usage.total_tokens == chat.usage.total_tokens
    assert response.usage.output_tokens_details.reasoning_tokens == 0
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert [(item.type, item.status) for item in response.output] == [("message", "incomplete")]
    assert (response.temperature, response.max_output_tokens, response.instructions) == (0, 8, "Be brief.")
    Response.model_validate(response.model_dump(by_alias=True, warnings=False))


def test_a_stream_says_what_the_whole_answer_says(client):
    asked = {"input": QUESTION, "include": ["message.output_text.logprobs"], "top_logprobs": 2, **GREEDY}
    whole = client.responses.create(**asked)
    events = streamed(client, **asked)
    final = events[-1].response
    told = [entry.logprob for e in events if e.type == "response.output_text.delta" for entry in e.logprobs]
    assert told == [entry.logprob for entry in final.output[0].content[0].logprobs]
    logprobs = whole.output[0].content[0].logprobs
    assert told == pytest.approx([entry.logprob for entry in logprobs], abs=1e-4)  # the prompt is in the cache now
    assert [len(entry.top_logprobs) for entry in logprobs] == [2] * 8
    for response in (final, whole):
        response.output[0].content[0].logprobs = None
    assert without_ids(final.model_dump()) == without_ids(whole.model_dump())


def test_lines_of_a_stream_name_their_event(client):
    with client.responses.with_streaming_response.create(input="x", stream=True, **GREEDY) as raw:
        lines = [line for line in raw.iter_lines() if line]
    names, data = lines[::2], lines[1::2]
    assert names[-1] == "event: response.incomplete"
    assert [f"event: {json.loads(line.removeprefix('data: '))['type']}" for line in data] == names


def test_a_schema_is_kept(client):
    wanted = {"format": {"type": "json_schema", "name": "person", "schema": SCHEMA, "strict": True}}
    asked = {"model": "demo", "input": QUESTION, "text": wanted, "max_output_tokens": 400, "extra_body": {"seed": 3}}
    response = client.responses.create(**asked)
    assert response.status == "completed"
    assert json.loads(response.output_text).keys() == {"name", "age"}
    assert response.text.format.schema_ == SCHEMA
    assert streamed(client, **asked)[-1].response.output_text == response.output_text
    with client.responses.stream(**asked) as stream:  # the client's own reading of the events
        assert stream.get_final_response().output_text == response.output_text


def test_an_earlier_response_is_continued(client):
    first = client.responses.create(input=QUESTION, instructions="Forgotten.", **GREEDY)
    second = client.responses.create(input="Go on", previous_response_id=first.id, **GREEDY)
    whole = [{"role": "user", "content": QUESTION}, *first.output, {"role": "user", "content": "Go on"}]
    by_hand = client.responses.create(input=whole, **GREEDY)
    assert second.output_text == by_hand.output_text
    assert second.usage.input_tokens == by_hand.usage.input_tokens
    third, third_by_hand = (
        client.responses.create(input="And on", previous_response_id=r.id, **GREEDY) for r in (second, by_hand)
    )
    assert third.output_text == third_by_hand.output_text
    assert third.usage.input_tokens == third_by_hand.usage.input_tokens > second.usage.input_tokens


def test_a_forced_call_and_its_output(client):
    response = client.responses.create(input=QUESTION, **FORCED)
    (call,) = response.output
    assert (call.type, call.name, call.status, response.status) == ("function_call", "lookup", "completed", "completed")
    assert json.loads(call.arguments)["kind"] in ("a", "b")
    events = streamed(client, input=QUESTION, **FORCED)
    assert without_ids(events[-1].response.model_dump()) == without_ids(response.model_dump())
    assert any(event.type == "response.function_call_arguments.done" for event in events)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    answer = client.responses.create(input=[result], previous_response_id=response.id, **GREEDY)
    by_hand = client.responses.create(input=[{"role": "user", "content": QUESTION}, call, result], **GREEDY)
    assert answer.output_text == by_hand.output_text
    named = client.responses.create(input="x", **{**FORCED, "tool_choice": {"type": "function", "name": "lookup"}})
    assert named.output[0].name == "lookup"


def test_reasoning_is_sent_back(client):
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    items = [
        {"role": "user", "content": "x"},
        thought,
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": "z"},
    ]
    response = client.responses.create(input=items, **GREEDY)
    listed = client.responses.input_items.list(response.id, order="asc").data
    assert [item.type for item in listed] == ["message", "reasoning", "message", "message"]
    assert listed[1].content[0].text == "Hm."


def test_stored_responses(client):
    response = client.responses.create(input=[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], **GREEDY)
    assert client.responses.retrieve(response.id) == response
    page = client.responses.input_items.list(response.id, limit=1)
    assert [item.content[0].text for item in page.data] == ["b"]
    assert [item.content[0].text for item in page] == ["b", "a"], "the client turns the pages"
    with pytest.raises(openai.BadRequestError, match="synchronous"):
        client.responses.cancel(response.id)
    client.responses.delete(response.id)
    api = client.responses
    for ask in (api.retrieve, api.delete, api.cancel, api.input_items.list):
        with pytest.raises(openai.NotFoundError) as refused:
            ask(response.id)
        assert refused.value.code == "response_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(input="x", previous_response_id=response.id, **GREEDY)
    assert refused.value.code == "previous_response_not_found"
    unstored = client.responses.create(input="x", store=False, **GREEDY)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unstored.id)


def test_truncation_leaves_out_the_oldest_turns(client):
    turns = [{"role": "user", "content": f"{index} " + "def main(self): " * 100} for index in range(8)]
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(input=turns, **GREEDY)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "input")
    cut = client.responses.create(input=turns, truncation="auto", **GREEDY)
    last = client.responses.create(input=turns[-1:], **GREEDY)
    room = 2048 - 8
    assert cut.usage.input_tokens <= room < cut.usage.input_tokens + last.usage.input_tokens, "no turn more than it takes"


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("nonsense", {"extra_body": {"nonsense": 1}}),
        ("conversation", {"conversation": "conv_1"}),
        ("background", {"background": True}),
        ("temperature", {"temperature": -1}),
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("max_output_tokens", {"extra_body": {"max_output_tokens": "8"}}),
        ("tools.0.type", {"tools": [{"type": "web_search"}]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("text.format.schema", {"text": {"format": {"type": "json_schema", "name": "x"}}}),
        ("text.format", {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nonsense"}}}}),
        ("stream_options", {"stream_options": {"include_obfuscation": False}}),
        ("include.0", {"include": ["reasoning.encrypted_content"]}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("reasoning.effort", {"reasoning": {"effort": "huge"}}),
        ("metadata.a", {"metadata": {"a": 1}}),
        ("input", {"input": []}),
        ("input.0.type", {"input": [{"type": "item_reference", "id": "msg_1"}]}),
        ("input.0.role", {"input": [{"role": "tool", "content": "x"}]}),
        ("input.1.content.0.type", {"input": ["x", {"role": "user", "content": [{"type": "input_image"}]}]}),
        ("input", {"input": [{"type": "function_call_output", "call_id": "no", "output": "x"}]}),
        ("input.0.colour", {"input": [{"role": "user", "content": "x", "colour": "red"}]}),
    ],
)
def test_an_error_names_the_field(client, field, arguments):
    if field == "input.1.content.0.type":
        arguments["input"][0] = {"role": "user", "content": "x"}
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**{"input": "x", **GREEDY, **arguments})
    assert refused.value.param == field


def test_a_failure_is_the_last_event(client):
    url = str(client.base_url).replace("/v1/", "/tokenize")
    (letter,) = httpx.post(url, json={"prompt": "a"}).json()["tokens"]
    never = {"allowed_token_ids": [letter], "structured_outputs": {"regex": "a{60}[0-9]"}}
    *_, last = client.responses.create(model="demo", input="x", stream=True, extra_body=never)
    assert (last.type, last.response.status, last.response.error.code) == ("response.failed", "failed", "server_error")
    assert "forbidden" in last.response.error.message
    with pytest.raises(openai.InternalServerError, match="forbidden"):
        client.responses.create(model="demo", input="x", extra_body=never)


ANSWER = """<think>Two of
them.</think>

I ask.
<tool_call>
{"name": "lookup", "arguments": {"kind": "a"}}
</tool_call>
<tool_call>
{"name": "lookup", "arguments": {"kind": "b"}}
</tool_call>"""


@pytest.mark.parametrize("size", [1, 3, 16, 1000])
def test_items_do_not_depend_on_how_the_text_is_cut(size):
    tool = {"type": "function", "function": {"name": "lookup", "parameters": TOOL["parameters"]}}
    parser = make_parser("hermes", "think", tools=[tool])
    output = ResponseOutput(ChatChoice(None, tool_named=False, token_ids=False))
    events = []
    for start in range(0, len(ANSWER), size):
        final = FinishReason.STOP if start + size >= len(ANSWER) else None
        parser.feed(ANSWER[start : start + size], final is not None)
        events += output.push(Piece(finish_reason=final, parsed=parser.out.take()))
    thought, message, *calls = output.items()
    assert thought["content"] == [{"type": "reasoning_text", "text": "Two of\nthem."}]
    assert message["content"][0]["text"].strip() == "I ask."
    assert [json.loads(call["arguments"]) for call in calls] == [{"kind": "a"}, {"kind": "b"}]
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == output.items()
    assert {item["status"] for item in output.items()} == {"completed"}


@pytest.mark.parametrize("field", ["input", "user", "tools"])
def test_half_a_character_is_refused(client, field):
    half = {"input": '"\\ud800"', "user": '"\\ud800"', "tools": json.dumps([{**TOOL, "parameters": {"title": "\ud800"}}])}
    body = f'{{"input": "x", "tool_choice": "none", "{field}": {half[field]}}}'
    answer = httpx.post(str(client.base_url) + "responses", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("shared", [False, True])
def test_the_store_forgets_what_was_not_used(tmp_path, shared):
    def response(id_, text=""):
        return StoredResponse({"id": id_}, [{"n": 1}], [{"text": text}])

    path = str(tmp_path / "responses.db") if shared else ":memory:"
    store = ResponseStore(path, max_responses=2, max_bytes=300)
    other = ResponseStore(path, max_responses=2, max_bytes=300) if shared else store
    store.add(response("a"))
    other.add(response("b"))
    assert other.get("a") == response("a")
    store.add(response("c"))
    assert [other.get(id_) is not None for id_ in "abc"] == [True, False, True]
    store.add(response("d", "x" * 200))
    assert [other.get(id_) is not None for id_ in "acd"] == [False, True, True]
    assert store.remove("c")
    assert not other.remove("c")
    store.add(response("e", "x" * 300))
    assert [store.get(id_) for id_ in "de"] == [None, None]
