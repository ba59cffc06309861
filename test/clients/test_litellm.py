"""LiteLLM with `openai/` models and a base URL."""

import json

import openai
import pytest
from pydantic import BaseModel

from test.clients import HELLO, PERSON, TOLD, WEATHER

litellm = pytest.importorskip("litellm", reason="litellm is not installed")
# its own way with pydantic
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the .model_:DeprecationWarning")

TOOLS = [
    {"type": "function", "function": {"name": name, "description": description, "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
    for name, description in (("get_weather", "The weather in a city"), ("get_time", "The time in a city"))
]  # fmt: skip


class Person(BaseModel):
    name: str
    city: str


@pytest.fixture
def common(demo):
    return {"model": "openai/demo", "api_base": demo.url + "/v1", "api_key": "none", "temperature": 0, "num_retries": 0}


def user(text):
    return [{"role": "user", "content": text}]


def ask(stream, **how):
    if not stream:
        return litellm.completion(**how)
    return litellm.stream_chunk_builder(list(litellm.completion(**how, stream=True)), messages=how["messages"])


@pytest.mark.parametrize("stream", [False, True])
def test_text_and_usage(common, stream):
    options = {"stream_options": {"include_usage": True}} if stream else {}
    answer = ask(stream, messages=user("Hello!"), **common, **options)
    assert answer.choices[0].message.content == HELLO
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (10, 9)


async def test_async(common):
    async with openai.AsyncOpenAI(base_url=common["api_base"], api_key="none", max_retries=0) as client:
        answer = await litellm.acompletion(messages=user("Hello!"), client=client, **common)
        assert answer.choices[0].message.content == HELLO
        stream = await litellm.acompletion(messages=user("Hello!"), client=client, stream=True, **common)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == HELLO


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_told(common, stream):
    """LiteLLM's answers carry fields of its own; they come back with the next request."""
    messages = user(WEATHER)
    message = ask(stream, messages=messages, tools=TOOLS, **common).choices[0].message
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    messages += [message, {"role": "tool", "tool_call_id": call.id, "name": "get_weather", "content": "cold"}]
    assert ask(stream, messages=messages, tools=TOOLS, **common).choices[0].message.content == TOLD


@pytest.mark.parametrize("wanted", [Person, {"type": "json_object"}], ids=["schema", "json_object"])
def test_response_format(common, wanted):
    answer = litellm.completion(messages=user(PERSON), response_format=wanted, **common)
    assert json.loads(answer.choices[0].message.content) == {"name": "Anna", "city": "Paris"}


def test_text_completion(common):
    answer = litellm.text_completion(prompt="abc", max_tokens=4, **{**common, "model": "text-completion-openai/demo"})
    assert answer.choices[0].text


def test_errors_are_mapped(common):
    with pytest.raises(litellm.NotFoundError, match="gpt-4"):
        litellm.completion(messages=user("Hello!"), **{**common, "model": "openai/gpt-4"})
    with pytest.raises(litellm.BadRequestError, match="The context of this model is"):
        litellm.completion(messages=user("abc " * 100_000), **common)
    with pytest.raises(litellm.BadRequestError, match="no embeddings"):
        litellm.embedding(model="openai/demo", input=["a"], api_base=common["api_base"], api_key="none")
