"""pydantic-ai's agents, over chat completions and over responses."""

import openai
import pytest
import pytest_asyncio
from pydantic import BaseModel

from test.clients import HELLO, PERSON, TOLD, WEATHER

pydantic_ai = pytest.importorskip("pydantic_ai", reason="pydantic-ai is not installed")
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel  # noqa: E402
from pydantic_ai.providers.openai import OpenAIProvider  # noqa: E402


class Person(BaseModel):
    name: str
    city: str


@pytest_asyncio.fixture(params=[OpenAIChatModel, OpenAIResponsesModel], ids=["chat completions", "responses"])
async def agent(request, demo):
    async with openai.AsyncOpenAI(base_url=demo.url + "/v1", api_key="none", max_retries=0) as client:

        def make(**how):
            model = request.param("demo", provider=OpenAIProvider(openai_client=client))
            return pydantic_ai.Agent(model, model_settings={"temperature": 0, "max_tokens": 60}, **how)

        yield make


def with_tools(agent, **how):
    made = agent(**how)

    @made.tool_plain
    def get_weather(city: str) -> str:
        """The weather in a city"""
        return {"Paris": "cold"}[city]

    @made.tool_plain
    def get_time(city: str) -> str:
        """The time in a city"""
        return {"Paris": "12:30"}[city]

    return made


async def test_text_streamed_and_whole(agent):
    result = await agent().run("Hello!")
    assert (result.output, result.usage.input_tokens, result.usage.output_tokens) == (HELLO, 10, 9)
    async with agent().run_stream("Hello!") as stream:
        assert "".join([text async for text in stream.stream_text(delta=True)]) == HELLO


async def test_history(agent):
    first = await agent().run("My name is Ada.")
    second = await agent().run("What is my name?", message_history=first.all_messages())
    assert "Ada" in second.output


async def test_tools(agent):
    assert (await with_tools(agent).run(WEATHER)).output == TOLD
    async with with_tools(agent).run_stream(WEATHER) as stream:
        assert await stream.get_output() == TOLD


@pytest.mark.parametrize("form", ["native", "prompted", "tool"])
async def test_structured_output(agent, form):
    forms = {"native": pydantic_ai.NativeOutput, "prompted": pydantic_ai.PromptedOutput, "tool": pydantic_ai.ToolOutput}
    result = await agent(output_type=forms[form](Person)).run(PERSON)
    assert result.output.city == "Paris"
    assert result.output.name.startswith("Anna")
