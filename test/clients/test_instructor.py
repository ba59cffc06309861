"""instructor, which patches the `openai` client. Its releases pin older libraries, so it is tested where it is installed."""

import openai
import pytest
from pydantic import BaseModel, Field, field_validator

from test.clients import PERSON

instructor = pytest.importorskip("instructor", reason="instructor is not installed: it needs rich < 15")
MODES = ["TOOLS", "JSON", "JSON_SCHEMA", "RESPONSES_TOOLS"]
ASK = {"messages": [{"role": "user", "content": PERSON}], "model": "demo", "max_retries": 0}


class Person(BaseModel):
    name: str
    city: str


@pytest.fixture
def client(demo):
    with openai.OpenAI(base_url=demo.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("mode", MODES)
def test_structured_output(client, mode):
    patched = instructor.from_openai(client, mode=instructor.Mode[mode])
    got = patched.chat.completions.create(response_model=Person, temperature=0, **ASK)
    assert got.name.startswith("Anna")  # the demo model was not taught calls of this kind
    assert got.city == "Paris"


def test_another_try_after_a_wrong_answer(client):
    seen = []

    class Picky(BaseModel):
        name: str = Field(max_length=10)  # what a tiny model says of its own mistakes has no end

        @field_validator("name")
        @classmethod
        def check(cls, name: str) -> str:
            seen.append(name)
            if len(seen) < 2:
                raise ValueError("say it again")
            return name

    patched = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
    assert patched.chat.completions.create(response_model=Picky, temperature=0, **{**ASK, "max_retries": 2}).name == seen[-1]
