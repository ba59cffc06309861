"""From the engine's tokens to pieces of an answer: what counts as reasoning, and where an answer of one call ends."""

from types import SimpleNamespace

import pytest

from simple_flashinfer.server.choices import text_logprobs
from simple_flashinfer.server.service import Service
from simple_flashinfer.text.tokenizer import Tokenizer
from simple_flashinfer.types import EngineOutput, FinishReason, SamplingParams, TokenLogprobs

TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALL = '<tool_call>\n{"name": "f", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer(random_model):
    return Tokenizer(random_model, "hermes", "think")


async def pieces_of(tokenizer, text, size, **more):
    """With so many of the engine's tokens at a time, as to a client that is slow."""
    ids = tokenizer.encode(text)

    async def generate(request):
        for at in range(0, len(ids), size):
            yield EngineOutput("0", ids[at : at + size], FinishReason.LENGTH if at + size >= len(ids) else None)

    service = Service(None, SimpleNamespace(generate=generate), tokenizer, None)
    parser, shown = tokenizer.output_parser("", TOOLS, **more)
    return [piece async for piece in service.generate(SimpleNamespace(params=SamplingParams()), parser, shown)]


def num_tokens_until(tokenizer, text, end):
    ids = tokenizer.encode(text)
    return next(n for n in range(len(ids)) if tokenizer.decode(ids[:n]).find(end) >= 0)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
async def test_reasoning_tokens_are_those_after_the_opening_and_with_the_closing_tag(tokenizer, size):
    text = "<think>\nOne, two. Well</think>\n\nThree, four."
    pieces = await pieces_of(tokenizer, text, size)
    before, after = (num_tokens_until(tokenizer, text, tag) for tag in ("<think>", "</think>"))
    assert sum(piece.num_reasoning_tokens for piece in pieces) == after - before
    assert "".join(piece.parsed.reasoning for piece in pieces) == "One, two. Well"
    assert "".join(piece.parsed.content for piece in pieces) == "Three, four."
    plain = await pieces_of(tokenizer, "Three, four.", size)
    assert sum(piece.num_reasoning_tokens for piece in plain) == 0


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
async def test_an_answer_of_one_call_ends_with_it(tokenizer, size):
    text = f"Well.\n{CALL}\n{CALL}\nDone."
    pieces = await pieces_of(tokenizer, text, size, single_call=True)
    assert {call.index for piece in pieces for call in piece.parsed.tool_calls} == {0}
    assert "".join(piece.parsed.content for piece in pieces) == "Well."
    assert [piece.finish_reason for piece in pieces[-2:]] == [None, FinishReason.STOP][-len(pieces) :]
    assert sum(len(piece.token_ids) for piece in pieces) == num_tokens_until(tokenizer, text, '"Rome"}}')
    several = await pieces_of(tokenizer, text, size)
    assert {call.index for piece in several for call in piece.parsed.tool_calls} == {0, 1}


@pytest.mark.parametrize("size", [1, 2, 1000])
@pytest.mark.parametrize(("params", "unseen"), [({}, 1), ({"include_stop_str_in_output": True}, 0), ({"stop": ("ree",)}, 0)])
async def test_a_token_that_is_no_text_has_no_logprobs_however_many_come_together(tokenizer, size, params, unseen):
    ids = tokenizer.encode("One, two, three")
    if "stop" not in params:
        ids.append(tokenizer.eos_token_id)
    entries = [TokenLogprobs(token, -1.0, 1) for token in ids]

    async def generate(request):
        for at in range(0, len(ids), size):
            reason = FinishReason.STOP if at + size >= len(ids) and "stop" not in params else None
            yield EngineOutput("0", ids[at : at + size], reason, logprobs=tuple(entries[at : at + size]))

    service = Service(None, SimpleNamespace(generate=generate), tokenizer, None)
    request = SimpleNamespace(params=SamplingParams(logprobs=0, **params))
    pieces = [piece async for piece in service.generate(request)]
    assert pieces[-1].finish_reason is FinishReason.STOP
    assert sum(len(piece.logprobs) for piece in pieces) == len(ids)
    assert [entry for piece in pieces for entry in text_logprobs(piece)] == entries[: len(ids) - unseen]
