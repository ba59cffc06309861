"""LangChain's clients for OpenAI and for Anthropic, with no more than the base URL changed."""

import openai
import pytest
from pydantic import BaseModel

from test.clients import HELLO, PERSON, TOLD, WEATHER

chat_models = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
from langchain_core.callbacks import get_usage_metadata_callback  # noqa: E402
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage  # noqa: E402
from langchain_core.tools import tool  # noqa: E402


class Person(BaseModel):
    name: str
    city: str


@tool
def get_weather(city: str) -> str:
    """The weather in a city"""
    return f"cold{city[:0]}"


@tool
def get_time(city: str) -> str:
    """The time in a city"""
    return f"12:30{city[:0]}"


@pytest.fixture(params=["chat completions", "responses", "messages"])
def model(request, demo):
    common = {"model": "demo", "api_key": "none", "temperature": 0, "max_retries": 0}
    if request.param == "messages":
        anthropic = pytest.importorskip("langchain_anthropic", reason="langchain-anthropic is not installed")
        return anthropic.ChatAnthropic(**common, base_url=demo.url, max_tokens=60)
    responses = request.param == "responses"
    return chat_models.ChatOpenAI(**common, base_url=demo.url + "/v1", use_responses_api=responses, stream_usage=True)


def streamed(model, messages):
    whole = None
    for chunk in model.stream(messages):
        whole = chunk if whole is None else whole + chunk
    return whole


@pytest.mark.parametrize("ask", [lambda model, text: model.invoke(text), streamed], ids=["whole", "streamed"])
def test_text_and_usage(model, ask):
    with get_usage_metadata_callback() as callback:
        answer = ask(model, "What is 17 + 25?")
    assert answer.text == "42"
    assert answer.usage_metadata["input_tokens"] > answer.usage_metadata["output_tokens"] > 0
    (counted,) = callback.usage_metadata.values()
    assert counted["total_tokens"] == answer.usage_metadata["total_tokens"]


def test_many_at_once(model):
    answers = model.batch(["What is 17 + 25?", "83 - 46", "Hello!"])
    assert [answer.text for answer in answers] == ["42", "37", HELLO]


async def test_async(demo):
    async with openai.DefaultAsyncHttpxClient() as http:  # LangChain never closes its own
        model = chat_models.ChatOpenAI(
            model="demo", base_url=demo.url + "/v1", api_key="none", temperature=0, http_async_client=http
        )
        assert (await model.ainvoke("Hello!")).text == HELLO
        assert "".join([chunk.text async for chunk in model.astream("Hello!")]) == HELLO


@pytest.mark.parametrize("ask", [lambda model, text: model.invoke(text), streamed], ids=["whole", "streamed"])
def test_a_tool_is_called_and_its_result_told(model, ask):
    bound = model.bind_tools([get_weather, get_time])
    messages = [HumanMessage(WEATHER)]
    called = ask(bound, messages)
    (call,) = called.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    assert ask(bound, [*messages, called, get_weather.invoke(call)]).text == TOLD


def test_a_conversation_goes_on(model):
    said = [SystemMessage("Be brief."), HumanMessage([{"type": "text", "text": "My name is Ada."}])]
    assert "Ada" in model.invoke([*said, model.invoke(said), HumanMessage("What is my name?")]).text


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")  # LangChain dumps what it has parsed
@pytest.mark.parametrize(
    ("method", "strict"),
    [
        ("json_schema", None),
        ("json_schema", True),
        ("function_calling", None),
        ("function_calling", True),
        ("json_mode", None),
    ],
)
def test_structured_output(demo, method, strict):
    model = chat_models.ChatOpenAI(model="demo", base_url=demo.url + "/v1", api_key="none", temperature=0, max_retries=0)
    structured = model.with_structured_output(Person, method=method, strict=strict)
    assert structured.invoke(PERSON) == Person(name="Anna", city="Paris")
    if method != "function_calling":
        assert list(structured.stream(PERSON))[-1] == Person(name="Anna", city="Paris")


def test_an_answer_of_the_assistant_may_be_empty(demo):
    model = chat_models.ChatOpenAI(model="demo", base_url=demo.url + "/v1", api_key="none", temperature=0)
    assert model.invoke([HumanMessage("Hello!"), AIMessage([]), HumanMessage("Hello!")]).text


def test_plain_completions(demo):
    model = chat_models.OpenAI(model="demo", base_url=demo.url + "/v1", api_key="none", temperature=0, max_tokens=5)
    assert model.invoke("abc") == "".join(model.stream("abc")) != ""


def test_an_image_is_refused_by_name(demo):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    model = chat_models.ChatOpenAI(model="demo", base_url=demo.url + "/v1", api_key="none", max_retries=0)
    with pytest.raises(Exception, match=r"messages\.0\.content\.0\.type"):
        model.invoke([HumanMessage([image])])
