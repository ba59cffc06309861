"""Greedy tokens equal transformers' own `generate`, however the work is cut up."""

import pytest

from simple_flashinfer import LLM, SamplingParams
from test.conftest import ARCHITECTURES, OUTPUT_LENGTH, PROMPT_LENGTHS

GREEDY = SamplingParams(temperature=0, max_tokens=OUTPUT_LENGTH, ignore_eos=True)


@pytest.fixture(params=ARCHITECTURES)
def model(request, checkpoint):
    return checkpoint(request.param)


def tokens(outputs):
    return [output.token_ids for output in outputs]


def test_alone(model):
    llm = LLM(model.path, torch_dtype="float32", max_sequence=1)
    assert tokens(llm.generate(model.prompts, GREEDY, use_tqdm=False)) == model.expected
    llm.core.scheduler.check()


def test_sixteen_at_once(model):
    llm = LLM(model.path, torch_dtype="float32", max_sequence=16)
    outputs = llm.generate(model.prompts * 2, GREEDY, use_tqdm=False)
    assert tokens(outputs) == model.expected * 2
    assert llm.stats.num_steps < 2 * OUTPUT_LENGTH, "they did not run together"
    llm.core.scheduler.check()


def test_chunked_at_seven_tokens_a_step(model):
    llm = LLM(model.path, torch_dtype="float32", max_num_batched_tokens=7)
    assert tokens(llm.generate(model.prompts, GREEDY, use_tqdm=False)) == model.expected
    assert llm.stats.num_steps >= sum(PROMPT_LENGTHS) / 7
    llm.core.scheduler.check()


def test_from_the_prefix_cache(model):
    """The second time most of each prompt is in the cache; the third time a whole conversation is."""
    llm = LLM(model.path, torch_dtype="float32", max_num_batched_tokens=50)
    assert tokens(llm.generate(model.prompts, GREEDY, use_tqdm=False)) == model.expected
    again = llm.generate(model.prompts, GREEDY, use_tqdm=False)
    assert tokens(again) == model.expected
    assert [output.num_cached_tokens for output in again] == [(length - 1) // 16 * 16 for length in PROMPT_LENGTHS]
    turns = [[*prompt, *answer[:12]] for prompt, answer in zip(model.prompts, model.expected, strict=True)]
    rest = llm.generate(turns, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
    assert tokens(rest) == [answer[12:] for answer in model.expected]
    assert [output.num_cached_tokens for output in rest] == [(length + 11) // 16 * 16 for length in PROMPT_LENGTHS]
    llm.core.scheduler.check()


@pytest.mark.parametrize("page_size", [16, 5])
def test_preempted(model, page_size):
    longest = max(PROMPT_LENGTHS) + OUTPUT_LENGTH
    pages = -(-longest // page_size) + 3
    layer = ARCHITECTURES["llama"]
    page_bytes = page_size * layer.num_hidden_layers * layer.num_key_value_heads * layer.head_dim * 2 * 4
    llm = LLM(
        model.path,
        torch_dtype="float32",
        page_size=page_size,
        max_model_len=longest,
        kv_cache_memory=pages * page_bytes,
    )
    assert llm.info.num_pages == pages
    assert tokens(llm.generate(model.prompts, GREEDY, use_tqdm=False)) == model.expected
    assert llm.stats.num_preemptions > 0
    assert llm.stats.num_free_pages == pages
    llm.core.scheduler.check()


def test_overlapping_steps(model):
    """With everything at once: chunks, too few pages, prefixes that are found."""
    longest = max(PROMPT_LENGTHS) + OUTPUT_LENGTH
    layer = ARCHITECTURES["llama"]
    page_bytes = 16 * layer.num_hidden_layers * layer.num_key_value_heads * layer.head_dim * 2 * 4
    settings = {
        "max_model_len": longest,
        "max_num_batched_tokens": 50,
        "kv_cache_memory": (-(-longest // 16) + 3) * page_bytes,
    }
    llm = LLM(model.path, torch_dtype="float32", overlap=True, **settings)
    for _ in range(2):
        assert tokens(llm.generate(model.prompts, GREEDY, use_tqdm=False)) == model.expected
        assert llm.stats.num_free_pages == llm.info.num_pages
        llm.core.scheduler.check()
    assert llm.stats.num_preemptions > 0


@pytest.mark.parametrize("overlap", [False, True])
def test_after_a_client_left(model, overlap):
    llm = LLM(model.path, torch_dtype="float32", max_num_batched_tokens=40, overlap=overlap)
    expected = {}
    leaving = set()
    for index, (prompt, answer) in enumerate(zip(model.prompts, model.expected, strict=True)):
        request_id = llm.add_request(prompt, GREEDY)
        expected[request_id] = answer
        if index % 3 == 1:
            leaving.add(request_id)
    finished = {}
    while llm.has_unfinished:
        for output in llm.step():
            if output.request_id in leaving and len(output.token_ids) == 5:
                llm.abort(output.request_id)
                llm.core.scheduler.check()
            elif output.finish_reason:
                finished[output.request_id] = output.token_ids
    assert finished == {request_id: answer for request_id, answer in expected.items() if request_id not in leaving}
    while llm.core.has_work:
        llm.step()
    assert llm.stats.num_free_pages == llm.info.num_pages
