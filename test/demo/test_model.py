"""The model that comes along gives answers that are right or wrong: whatever happens to a request, they stay right."""

import asyncio
import json
import random

import openai
import pytest

from simple_flashinfer import LLM, SamplingParams
from simple_flashinfer.demo import DEMO_FOLDER
from simple_flashinfer.demo.corpus import conversation
from simple_flashinfer.demo.evaluate import questions
from test.daemon import Daemon

GREEDY = SamplingParams(temperature=0, max_tokens=60)
FLOAT32 = {"model": str(DEMO_FOLDER), "torch_dtype": "float32"}
RECORDED = json.loads((DEMO_FOLDER.parents[2] / "test" / "demo" / "answers.json").read_text())
NAMES = "Ada Alan Alice Amir Anna Arun Ben Bella Carl Clara Dan Dora Emil Emma Eric Eva Felix Finn Fiona Grace".split()  # noqa: SIM905
CITIES = "Berlin Boston Cairo Delhi Dublin Lima London Madrid Oslo Paris Prague Rome".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def recalls():
    """(messages, right answer) of conversations in which something is remembered over up to a thousand tokens."""
    rng = random.Random("recalls")
    made = [conversation(rng, "memory", held_out=False, filler_tokens=tokens) for tokens in (0, 0, 100, 300, 800) * 4]
    return [questions(m)[-1] for m in made]


@pytest.fixture(scope="module")
def alone(recalls):
    """What the model answers to each when nothing else runs."""
    llm = LLM(**FLOAT32, prefix_caching=False)
    return [answers(llm, [messages])[0] for messages, _ in recalls]


def answers(llm, conversations):
    prompts = [llm.tokenizer.encode_chat(messages) for messages in conversations]
    return [output.text for output in llm.generate(prompts, GREEDY, use_tqdm=False)]


def test_what_was_said_earlier_is_recalled(recalls, alone):
    right = [got == want for got, (_, want) in zip(alone, recalls, strict=True)]
    assert sum(right) >= 0.8 * len(right), list(zip(alone, recalls, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 7, "max_sequence": 4},
        {"max_sequence": 32},
        {"page_size": 1},
    ],
    ids=["7 tokens a step", "all at once", "pages of one token"],
)
def test_recall_stays_the_same(recalls, alone, settings):
    llm = LLM(**FLOAT32, **settings)
    assert answers(llm, [messages for messages, _ in recalls]) == alone


def test_answers_stay_the_same_when_requests_are_preempted(recalls):
    long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    roomy = LLM(**FLOAT32, prefix_caching=False)
    prompts = [roomy.tokenizer.encode_chat(messages) for messages, _ in recalls]
    prompts = [prompt for prompt in prompts if len(prompt) < 230]
    expected = [output.token_ids for output in roomy.generate(prompts, long, use_tqdm=False)]
    llm = LLM(**FLOAT32, kv_cache_memory="2MiB", max_model_len=300, page_size=1, prefix_caching=False)
    assert [output.token_ids for output in llm.generate(prompts, long, use_tqdm=False)] == expected
    assert llm.stats.num_preemptions > 0


def test_recall_stays_the_same_when_the_prompt_is_in_the_cache(recalls, alone):
    llm = LLM(**FLOAT32)
    for _ in range(2):
        assert answers(llm, [messages for messages, _ in recalls]) == alone
    longest = max((messages for messages, _ in recalls), key=lambda m: len(str(m)))
    (output,) = llm.generate([llm.tokenizer.encode_chat(longest)], GREEDY, use_tqdm=False)
    assert output.num_cached_tokens > 500


def test_recorded_answers():
    llm = LLM(**FLOAT32)
    assert answers(llm, [[{"role": "user", "content": text}] for text in RECORDED]) == list(RECORDED.values())


@pytest.fixture(scope="module")
def demo():
    with Daemon() as running:
        yield running


async def test_32_conversations_at_once_keep_their_memories_apart(demo):
    async with openai.AsyncOpenAI(base_url=demo.url + "/v1", api_key="none", max_retries=0) as client:

        async def talk(index):
            name, city = NAMES[index % len(NAMES)], CITIES[index % len(CITIES)]
            messages, heard = [], []
            for text in (
                f"My name is {name}.",
                f"I live in {city}.",
                "What is 2 + 3?",
                "What is my name?",
                "Where do I live?",
            ):
                messages.append({"role": "user", "content": text})
                answer = await client.chat.completions.create(model="demo", messages=messages, temperature=0)
                messages.append({"role": "assistant", "content": answer.choices[0].message.content})
                heard.append(answer.choices[0].message.content)
                assert answer.choices[0].finish_reason == "stop"
            return name in heard[3] and city in heard[4]

        assert all(await asyncio.gather(*(talk(index) for index in range(32))))
    demo.wait_until_idle()


TOOLS = [
    {"type": "function", "function": {"name": name, "description": description, "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
    for name, description in (("get_weather", "The weather in a city"), ("get_time", "The time in a city"))
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_told(demo, stream):
    with openai.OpenAI(base_url=demo.url + "/v1", api_key="none", max_retries=0) as client:
        messages = [{"role": "user", "content": "What is the weather in Paris?"}]

        def ask():
            if not stream:
                return client.chat.completions.create(model="demo", messages=messages, tools=TOOLS, temperature=0).choices[0]
            with client.chat.completions.stream(model="demo", messages=messages, tools=TOOLS, temperature=0) as events:
                return events.get_final_completion().choices[0]

        called = ask()
        assert called.finish_reason == "tool_calls"
        (call,) = called.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
        messages += [
            {"role": "assistant", "content": None, "tool_calls": [call.model_dump(include={"id", "type", "function"})]},
            {"role": "tool", "tool_call_id": call.id, "content": "cold"},
        ]
        assert ask().message.content == "The weather in Paris is cold."


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_time"}}])
def test_a_tool_call_can_be_forced(demo, choice):
    with openai.OpenAI(base_url=demo.url + "/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Hello!"}], tools=TOOLS, tool_choice=choice, temperature=0,
            max_tokens=100, parallel_tool_calls=False,
        )  # fmt: skip
        (call,) = answer.choices[0].message.tool_calls
        assert (
            call.function.name in ("get_weather", "get_time") if choice == "required" else call.function.name == "get_time"
        )
        assert json.loads(call.function.arguments).keys() == {"city"}


@pytest.mark.parametrize("stream", [False, True])
def test_only_some_of_the_tools_may_be_called(demo, stream):
    """The model wants to call get_weather, and is shown it."""

    def ask(client, text, mode, *names):
        tools = [{"type": "function", "function": {"name": name}} for name in names]
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}
        asked = {"model": "demo", "messages": [{"role": "user", "content": text}], "tools": TOOLS, "tool_choice": choice}
        if not stream:
            return client.chat.completions.create(**asked, temperature=0).choices[0]
        with client.chat.completions.stream(**asked, temperature=0) as events:
            return events.get_final_completion().choices[0]

    with openai.OpenAI(base_url=demo.url + "/v1", api_key="none", max_retries=0) as client:
        for names in (["get_weather"], ["get_time"], ["get_weather", "get_time"]):
            answer = ask(client, "What is the weather in Paris?", "auto", *names)
            assert [call.function.name for call in answer.message.tool_calls] == names[:1]
            assert json.loads(answer.message.tool_calls[0].function.arguments) == {"city": "Paris"}
            assert answer.finish_reason == "tool_calls"
        assert ask(client, "Hello!", "auto", "get_time").message.content == "Hello! How can I help you?"
        assert ask(client, "Hello!", "required", "get_time").message.tool_calls[0].function.name == "get_time"
        tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
        for mode in ("auto", "required"):
            choice = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": "get_time"}]}
            asked = {"model": "demo", "input": "What is the weather in Paris?", "tools": tools, "tool_choice": choice}
            response = client.responses.create(**asked, temperature=0)
            assert [item.name for item in response.output] == ["get_time"]
            assert response.tool_choice.model_dump() == choice


CITY_AS_JSON = {"type": "json_schema", "json_schema": {"name": "city", "schema": {
    "type": "object", "properties": {"name": {"type": "string"}, "city": {"type": "string"}},
    "required": ["name", "city"], "additionalProperties": False}}}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_with_tools_and_a_response_format_the_model_calls_or_answers(demo, stream):
    def ask(client, text, **how):
        asked = {
            "model": "demo", "messages": [{"role": "user", "content": text}], "tools": TOOLS, "temperature": 0,
            "response_format": CITY_AS_JSON, **how,
        }  # fmt: skip
        if not stream:
            return client.chat.completions.create(**asked).choices[0]
        with client.chat.completions.stream(**asked) as events:
            for event in events:
                if event.type == "chunk":
                    snapshot = event.snapshot
        return snapshot.choices[0]

    with openai.OpenAI(base_url=demo.url + "/v1", api_key="none", max_retries=0) as client:
        for how in ({}, {"parallel_tool_calls": False}, {"tool_choice": "required"}):
            called = ask(client, "What is the weather in Paris?", **how)
            (call,) = called.message.tool_calls
            assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
            assert called.finish_reason == "tool_calls"
            assert not called.message.content
        answered = ask(client, "Extract name and city as JSON: Anna from Paris is 30.")
        assert json.loads(answered.message.content) == {"name": "Anna", "city": "Paris"}
        assert not answered.message.tool_calls
