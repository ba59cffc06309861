"""What each parameter does, seen through the real `openai` client; transformers says what the numbers must be."""

import json
import re

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MESSAGES = [{"role": "user", "content": "class Request: def main(self)"}]
GREEDY = {"model": "demo", "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def reference(random_model):
    return AutoTokenizer.from_pretrained(random_model), AutoModelForCausalLM.from_pretrained(
        random_model, dtype=torch.float32
    )


@pytest.fixture
def client(daemon):
    with openai.OpenAI(base_url=daemon.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def log_softmax(model, ids):
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)


def test_logprobs_of_a_chat_are_the_log_softmax_of_the_logits(client, reference):
    tokenizer, model = reference
    # what is drawn does not change what is reported: the logits as they are
    answer = client.chat.completions.create(
        messages=MESSAGES, logprobs=True, top_logprobs=3, presence_penalty=1, extra_body={"return_token_ids": True}, **GREEDY
    )
    (choice,) = answer.choices
    ids, prompt = choice.token_ids, choice.prompt_token_ids
    assert len(choice.logprobs.content) == len(ids) == 8
    expected = log_softmax(model, prompt + ids)[len(prompt) - 1 : -1]
    for token, entry, row in zip(ids, choice.logprobs.content, expected, strict=True):
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)
        best = row.topk(3)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
    assert b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode(errors="replace") == tokenizer.decode(
        ids
    )
    streamed = list(
        client.chat.completions.create(
            messages=MESSAGES, logprobs=True, top_logprobs=3, presence_penalty=1, stream=True, **GREEDY
        )
    )
    entries = [e for chunk in streamed if chunk.choices[0].logprobs for e in chunk.choices[0].logprobs.content]
    assert [e.token for e in entries] == [e.token for e in choice.logprobs.content]


def test_an_echo_alone_has_no_output(client):
    answer = client.completions.create(
        model="demo", prompt="def main", echo=True, logprobs=1, max_tokens=0, extra_body={"return_token_ids": True}
    )
    (choice,) = answer.choices
    assert (choice.text, choice.token_ids, choice.finish_reason) == ("def main", [], "length")
    assert len(choice.logprobs.tokens) == answer.usage.prompt_tokens == answer.usage.total_tokens
    assert answer.usage.completion_tokens == 0


def test_echo_and_the_logprobs_of_the_prompt(client, reference):
    tokenizer, model = reference
    prompt = tokenizer.encode("def main(self): return")
    for _ in range(2):  # the second time the prompt is in the cache, which has no logits
        answer = client.completions.create(
            model="demo",
            prompt=prompt,
            echo=True,
            logprobs=2,
            max_tokens=0,
            temperature=0,
            extra_body={"prompt_logprobs": 1},
        )
        (choice,) = answer.choices
        assert choice.text == tokenizer.decode(prompt)
        assert choice.logprobs.token_logprobs[0] is None
        rows = log_softmax(model, prompt)
        expected = [rows[i, token].item() for i, token in enumerate(prompt[1:])]
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
        assert choice.logprobs.text_offset[:2] == [0, len(choice.logprobs.tokens[0])]
        for row, token, entry in zip(rows, prompt[1:], choice.prompt_logprobs[1:], strict=False):
            assert entry[str(token)]["rank"] == (row > row[token]).sum() + 1
            assert len(entry) in (1, 2)


def test_a_long_prompt_gets_its_logprobs_in_chunks(client, reference):
    tokenizer, model = reference
    prompt = (tokenizer.encode("def main(self): return ") * 100)[:700]
    answer = client.completions.create(model="demo", prompt=prompt, echo=True, logprobs=0, max_tokens=1, temperature=0)
    expected = log_softmax(model, prompt)[:-1].gather(1, torch.tensor(prompt)[1:, None])[:, 0]
    assert answer.choices[0].logprobs.token_logprobs[1:-1] == pytest.approx(expected.tolist(), abs=2e-4)


def test_n_answers_share_the_prompt(client):
    prompt = "def main(self): " * 60
    answer = client.completions.create(model="demo", prompt=prompt, n=3, seed=5, max_tokens=6, temperature=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts)) == 3
    alone = client.completions.create(model="demo", prompt=prompt, seed=6, max_tokens=6, temperature=1)
    assert alone.choices[0].text == texts[1], "the n-th answer is that of the n-th seed"
    assert answer.usage.completion_tokens == 18
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
    again = list(
        client.completions.create(model="demo", prompt=prompt, n=3, seed=5, max_tokens=6, temperature=1, stream=True)
    )
    for index, text in enumerate(texts):
        assert "".join(c.text for chunk in again for c in chunk.choices if c.index == index) == text


def test_several_prompts_in_one_request(client):
    prompts = ["def a", "def b", "class"]
    alone = [client.completions.create(prompt=p, **GREEDY).choices[0].text for p in prompts]
    together = client.completions.create(prompt=prompts, n=2, **GREEDY)
    assert [choice.text for choice in together.choices] == [text for text in alone for _ in range(2)]
    assert together.usage.completion_tokens == 6 * 8


def test_what_may_be_drawn(client, reference):
    tokenizer, _ = reference
    plain = client.completions.create(prompt="def main", extra_body={"return_token_ids": True}, **GREEDY).choices[0]
    first = plain.token_ids[0]
    biased = client.completions.create(
        prompt="def main", logit_bias={str(first): -100}, extra_body={"return_token_ids": True}, **GREEDY
    )
    assert first not in biased.choices[0].token_ids
    allowed = client.completions.create(
        prompt="def main", extra_body={"return_token_ids": True, "allowed_token_ids": [50, 60]}, **GREEDY
    )
    assert set(allowed.choices[0].token_ids) <= {50, 60}
    # only the tokens of a word as the tokenizer writes it are known to be bad: other tokens may spell it too
    words = [tokenizer.decode([token]) for token in plain.token_ids]
    word = next(w for w, token in zip(words, plain.token_ids, strict=True) if w.strip() and tokenizer.encode(w) == [token])
    without = client.completions.create(
        prompt="def main", extra_body={"bad_words": [word], "return_token_ids": True}, **GREEDY
    )
    assert tokenizer.encode(word)[0] not in without.choices[0].token_ids


def test_a_grammar_that_is_complete_ends_before_min_tokens(client):
    more = {"min_tokens": 7, "structured_outputs": {"regex": "ab?"}}
    answer = client.completions.create(prompt="def main", extra_body=more, **GREEDY)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab", "stop"), "as long as the grammar lets it"


def test_min_tokens_holds_off_stop_strings_and_stop_tokens(client):
    plain = client.completions.create(prompt="def main", extra_body={"return_token_ids": True}, **GREEDY).choices[0]
    stopping = {"stop_token_ids": [plain.token_ids[2]]}
    early = client.completions.create(prompt="def main", extra_body=stopping, **GREEDY)
    assert early.usage.completion_tokens == plain.token_ids.index(plain.token_ids[2]) + 1
    assert early.choices[0].stop_reason == plain.token_ids[2]
    late = client.completions.create(prompt="def main", extra_body={**stopping, "min_tokens": 6}, **GREEDY)
    assert late.usage.completion_tokens >= 6
    stop = plain.text[:2]
    held = client.completions.create(prompt="def main", stop=stop, extra_body={"min_tokens": 5}, **GREEDY)
    assert held.choices[0].text.startswith(stop)


def test_a_stop_string_in_the_output(client):
    plain = client.completions.create(prompt="def main", **GREEDY).choices[0].text
    stop = plain[3:5]
    kept = client.completions.create(prompt="def main", stop=stop, extra_body={"include_stop_str_in_output": True}, **GREEDY)
    assert kept.choices[0].text == plain[: plain.index(stop) + len(stop)]
    assert kept.choices[0].stop_reason == stop


def test_a_prompt_is_truncated_from_its_beginning(client, reference):
    ids = reference[0].encode("def main(self): return 5")
    cut = client.completions.create(prompt=ids, extra_body={"truncate_prompt_tokens": 3}, **GREEDY)
    whole = client.completions.create(prompt=ids[-3:], **GREEDY)
    assert (cut.usage.prompt_tokens, cut.choices[0].text) == (3, whole.choices[0].text)


def test_continuing_the_last_message(client, reference):
    messages = [*MESSAGES, {"role": "assistant", "content": "class"}]
    answer = client.chat.completions.create(
        messages=messages, extra_body={"continue_final_message": True, "return_token_ids": True}, **GREEDY
    )
    assert reference[0].decode(answer.choices[0].prompt_token_ids).endswith("class")


def test_usage_with_each_chunk(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client.completions.create(prompt="def", stream=True, stream_options=options, **GREEDY))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 8
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == 0


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_kept_even_by_a_model_that_knows_nothing(client, stream):
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    got = client.chat.completions.create(
        model="demo", messages=MESSAGES, response_format=wanted, seed=3, max_tokens=400, stream=stream
    )
    text = "".join(c.choices[0].delta.content or "" for c in got) if stream else got.choices[0].message.content
    person = json.loads(text)
    assert person.keys() == {"name", "age"}
    assert 1 <= person["age"] <= 99


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-c]{2}"}, "[0-9]{3}-[a-c]{2}"),
        ({"choice": ["yes", "no", "may be"]}, "yes|no|may be"),
        ({"grammar": 'start: "a" | "b" start "c"'}, "b*ac*"),
        ({"json": {"enum": [1, "two"]}}, '1|"two"'),
    ],
)
def test_structured_outputs(client, wanted, pattern):
    answer = client.completions.create(
        model="demo", prompt="x", n=4, max_tokens=60, seed=1, logit_bias={}, extra_body={"structured_outputs": wanted}
    )
    ended = [choice.text for choice in answer.choices if choice.finish_reason == "stop"]
    assert ended
    assert all(re.fullmatch(pattern, text.strip()) for text in ended), ended


def test_requests_with_and_without_a_grammar_do_not_disturb_each_other(client, daemon):
    plain = client.completions.create(prompt="def main", **GREEDY).choices[0].text
    both = client.completions.create(
        prompt=["def main", "def main"], extra_body={"structured_outputs": {"regex": "[xy]+"}}, **GREEDY
    )
    assert {re.fullmatch("[xy]+", choice.text) is not None for choice in both.choices} == {True}
    assert client.completions.create(prompt="def main", **GREEDY).choices[0].text == plain
    daemon.wait_until_idle()


def test_nothing_may_be_drawn_is_an_error_of_that_request_alone(client):
    with pytest.raises(openai.InternalServerError, match="forbidden"):
        client.completions.create(
            prompt="x", extra_body={"allowed_token_ids": [50], "structured_outputs": {"regex": "[0-9]{40}"}}, **GREEDY
        )
    assert client.completions.create(prompt="x", **GREEDY).choices[0].text


def test_tokenize_and_detokenize(daemon, reference):
    tokenizer, _ = reference
    text = "def main(): 日本語"
    answer = daemon.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == tokenizer.encode(text)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert daemon.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}
    chat = daemon.post("/tokenize", {"messages": MESSAGES}).json()
    assert tokenizer.decode(chat["tokens"]) == tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    assert daemon.post("/tokenize", {}).status_code == 400
    assert daemon.post("/detokenize", {"tokens": [-1]}).json()["error"]["param"] == "tokens"


def test_embeddings_are_refused_clearly(client):
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        client.embeddings.create(model="demo", input="x")
