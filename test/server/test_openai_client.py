"""The real `openai` package against the real daemon, and transformers as the judge of what is right."""

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello! 日本語?"}]
LENGTH = 20


@pytest.fixture(scope="module")
def expected(random_model):
    """(prompt length, text, token ids) of transformers' own greedy answer to MESSAGES."""
    tokenizer = AutoTokenizer.from_pretrained(random_model)
    model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    out = model.generate(prompt, do_sample=False, max_new_tokens=LENGTH)[0, prompt.shape[1] :]
    return prompt.shape[1], tokenizer.decode(out, skip_special_tokens=True), out.tolist()


@pytest.fixture
def client(daemon):
    with openai.OpenAI(base_url=daemon.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(client, expected):
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, temperature=0, max_tokens=LENGTH)
    prompt_tokens, text, _ = expected
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "chat.completion"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt_tokens, LENGTH)
    assert answer.usage.total_tokens == prompt_tokens + LENGTH


def test_streamed_chat(client, expected):
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=MESSAGES,
            temperature=0,
            max_completion_tokens=LENGTH,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    prompt_tokens, text, _ = expected
    assert chunks[0].choices[0].delta.role == "assistant"
    assert not chunks[0].choices[0].delta.content
    assert len({chunk.id for chunk in chunks}) == 1
    *rest, usage = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in rest) == text
    assert [chunk.choices[0].finish_reason for chunk in rest][-1] == "length"
    assert all(chunk.choices[0].finish_reason is None for chunk in rest[:-1])
    assert all(chunk.usage is None for chunk in rest)
    assert usage.choices == []
    assert (usage.usage.prompt_tokens, usage.usage.completion_tokens) == (prompt_tokens, LENGTH)


async def test_async(daemon, expected):
    async with openai.AsyncOpenAI(base_url=daemon.url + "/v1", api_key="none", max_retries=0) as client:
        arguments = {"model": "demo", "messages": MESSAGES, "temperature": 0, "max_tokens": LENGTH}
        answer = await client.chat.completions.create(**arguments)
        assert answer.choices[0].message.content == expected[1]
        stream = await client.chat.completions.create(**arguments, stream=True)
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
        assert text == expected[1]


def test_cached_tokens_are_told(client):
    long = [{"role": "user", "content": "Count the words of this sentence: " + "one two three " * 20}]
    first, second = (client.chat.completions.create(model="demo", messages=long, max_tokens=2) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens < 16
    assert second.usage.prompt_tokens_details.cached_tokens == (second.usage.prompt_tokens - 1) // 16 * 16 > 0


def test_completions(client, random_model):
    tokenizer = AutoTokenizer.from_pretrained(random_model)
    ids = tokenizer.encode("def main")
    by_text = client.completions.create(model="demo", prompt="def main", temperature=0)
    by_tokens = client.completions.create(model="demo", prompt=ids, temperature=0)
    streamed = client.completions.create(model="demo", prompt=["def main"], temperature=0, stream=True)
    assert by_text.choices[0].text == by_tokens.choices[0].text == "".join(chunk.choices[0].text for chunk in streamed)
    assert by_text.usage.completion_tokens == 16, "OpenAI's default"
    assert by_text.object == "text_completion"


def test_content_parts_and_developer_say_the_same_as_strings(client):
    plain = client.chat.completions.create(model="demo", messages=MESSAGES, temperature=0, max_tokens=5)
    parts = client.chat.completions.create(
        model="demo",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello! "}, {"type": "text", "text": "日本語?"}]},
        ],
        temperature=0,
        max_tokens=5,
    )
    assert plain.choices[0].message.content == parts.choices[0].message.content
    assert plain.usage == parts.usage


def test_stop_strings_and_stop_tokens(client, expected, random_model):
    _, text, ids = expected
    stop = text[2:4]
    at = text.index(stop)
    for stream in (False, True):
        answer = client.chat.completions.create(
            model="demo", messages=MESSAGES, temperature=0, max_tokens=LENGTH, stop=[stop, "never"], stream=stream
        )
        if stream:
            chunks = list(answer)
            got = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            got, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
            assert answer.usage.completion_tokens < LENGTH
        assert (got, reason) == (text[:at], "stop")

    tokenizer = AutoTokenizer.from_pretrained(random_model)
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, temperature=0, max_tokens=LENGTH, extra_body={"stop_token_ids": [ids[4]]}
    )
    first = ids.index(ids[4])
    assert answer.choices[0].message.content == tokenizer.decode(ids[:first])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == first + 1


def test_seed(client):
    def draw(seed):
        return client.chat.completions.create(
            model="demo", messages=MESSAGES, seed=seed, max_tokens=12, extra_body={"top_k": 50}
        ).choices[0].message.content  # fmt: skip

    assert draw(7) == draw(7)
    assert len({draw(seed) for seed in range(5)}) > 1


def test_ignore_eos_and_an_end_of_sequence(client, random_model):
    """Every token but the end of sequence is punished away, so a request ends at once, unless it ignores that."""
    eos = AutoTokenizer.from_pretrained(random_model).eos_token_id
    prompt = [eos] * 4
    ended = client.completions.create(
        model="demo", prompt=prompt, max_tokens=9, temperature=0, extra_body={"repetition_penalty": 0.01}
    )
    assert (ended.choices[0].finish_reason, ended.choices[0].text, ended.usage.completion_tokens) == ("stop", "", 1)
    ignored = client.completions.create(
        model="demo",
        prompt=prompt,
        max_tokens=9,
        temperature=0,
        extra_body={"repetition_penalty": 0.01, "ignore_eos": True},
    )
    assert (ignored.choices[0].finish_reason, ignored.usage.completion_tokens) == ("length", 9)


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "demo"
    assert client.models.retrieve("demo").id == "demo"


def test_errors_arrive_as_the_client_s_own(client):
    with pytest.raises(openai.NotFoundError, match="gpt-4") as missing:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="demo", messages=MESSAGES, temperature=-1)
