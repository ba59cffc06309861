import pytest

from simple_flashinfer import LLM, SamplingParams
from simple_flashinfer.engine.requests import ContextLengthError
from simple_flashinfer.types import FinishReason


@pytest.fixture(scope="module")
def llm(random_model):
    return LLM(random_model, torch_dtype="float32", max_sequence=4)


def test_prompts_as_text_and_as_tokens(llm):
    greedy = SamplingParams(temperature=0, max_tokens=6)
    ids = llm.tokenizer.encode("def main")
    one, two, three = llm.generate(["def main", ids, "import"], greedy, use_tqdm=False)
    assert one.text == two.text == llm.tokenizer.decode(one.token_ids)
    assert one.prompt_token_ids == ids
    assert three.finish_reason is FinishReason.LENGTH
    assert llm.generate("def main", greedy, use_tqdm=False)[0].text == one.text
    assert llm.generate(ids, greedy, use_tqdm=False)[0].text == one.text


def test_a_progress_bar(llm, capsys):
    llm.generate(["a", "b"], SamplingParams(max_tokens=2))
    assert "2/2" in capsys.readouterr().err


def test_parameters_for_each_prompt(llm):
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 5)]
    assert [len(output.token_ids) for output in llm.generate(["a", "b"], params, use_tqdm=False)] == [1, 5]
    with pytest.raises(ValueError, match="3 prompts came with 2"):
        llm.generate(["a", "b", "c"], params)


def test_a_seed_means_the_same_in_any_batch(llm):
    def params(seed):
        return SamplingParams(seed=seed, max_tokens=15, top_k=40, temperature=1.3)

    alone = [llm.generate("def", params(seed), use_tqdm=False)[0].token_ids for seed in range(6)]
    assert len({tuple(tokens) for tokens in alone}) > 1
    together = llm.generate(["def"] * 6 + ["import os"], [*map(params, range(6)), params(0)], use_tqdm=False)
    assert [output.token_ids for output in together[:6]] == alone


def test_without_a_seed_requests_differ(llm):
    outputs = llm.generate(["def"] * 4, SamplingParams(max_tokens=12), use_tqdm=False)
    assert len({tuple(output.token_ids) for output in outputs}) > 1


def test_stop_strings(llm):
    whole = llm.generate("def main", SamplingParams(temperature=0, max_tokens=30), use_tqdm=False)[0].text
    stop = whole[10:14]
    cut = llm.generate("def main", SamplingParams(temperature=0, max_tokens=30, stop=(stop,)), use_tqdm=False)[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason is FinishReason.STOP
    assert llm.stats.num_free_pages == llm.info.num_pages


def test_penalties_change_what_is_said(llm):
    repeated = llm.generate("def main", SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)[0].token_ids
    varied = llm.generate(
        "def main", SamplingParams(temperature=0, max_tokens=40, frequency_penalty=2, presence_penalty=2), use_tqdm=False
    )[0].token_ids
    assert len(set(varied)) > len(set(repeated))


def test_driven_by_hand(llm):
    request_id = llm.add_request("def main", SamplingParams(temperature=0, max_tokens=5))
    gone = llm.add_request("import", SamplingParams(temperature=0, max_tokens=50))
    lengths = []
    while llm.has_unfinished:
        for output in llm.step():
            if output.request_id == gone:
                llm.abort(gone)
            else:
                assert output.request_id == request_id
                lengths.append(len(output.token_ids))
    assert lengths == [1, 2, 3, 4, 5]
    assert llm.step() == []


def test_what_can_not_be_served_runs_nothing(llm):
    with pytest.raises(ContextLengthError, match="2048"):
        llm.generate(["fine", [5] * 3000], SamplingParams(max_tokens=3), use_tqdm=False)
    assert not llm.has_unfinished
    assert llm.stats.num_waiting == llm.stats.num_running == 0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop": ("",)}, "stop"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids"),
    ],
)
def test_bad_parameters_name_themselves(options, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        SamplingParams(**options)


GRAMMAR = '{"grammars":[{"lark_grammar":"start: /[a-z]{3,9}/"}]}'
EVERY_WAY_TO_DRAW = [
    SamplingParams(temperature=0, max_tokens=20),
    SamplingParams(seed=1, max_tokens=20, temperature=1.4, top_p=0.9),
    SamplingParams(seed=2, max_tokens=20, repetition_penalty=1.3, presence_penalty=0.5),
    SamplingParams(seed=3, max_tokens=20, frequency_penalty=1.0, min_tokens=15, stop_token_ids=tuple(range(0, 200, 2))),
    SamplingParams(seed=4, max_tokens=20, stop_token_ids=tuple(range(0, 200, 2))),
    SamplingParams(seed=5, max_tokens=20, logprobs=3, prompt_logprobs=2),
    SamplingParams(seed=6, max_tokens=20, bad_words=("def", "a b"), logit_bias=((5, 3.0),)),
    SamplingParams(seed=7, max_tokens=20, grammar=GRAMMAR),
    SamplingParams(seed=8, max_tokens=20, stop=("e",)),
]


@pytest.mark.parametrize("alone", [True, False], ids=["each alone", "all at once"])
def test_overlapping_steps_change_nothing(random_model, alone):
    def run(overlap):
        llm = LLM(random_model, torch_dtype="float32", overlap=overlap, max_num_batched_tokens=16)
        batches = [[params] for params in EVERY_WAY_TO_DRAW] if alone else [EVERY_WAY_TO_DRAW]
        outputs = [o for batch in batches for o in llm.generate(["def main(a, b):"] * len(batch), batch, use_tqdm=False)]
        assert all(output.error is None for output in outputs)
        llm.core.scheduler.check()
        return [(o.token_ids, o.text, o.finish_reason, o.logprobs, o.prompt_logprobs, o.num_cached_tokens) for o in outputs]

    one_after_the_other, overlapping = run(False), run(True)
    reasons = {reason for _, _, reason, *_ in overlapping}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
    if alone:
        assert overlapping == one_after_the_other
    else:  # who shares whose prefix depends on when a request comes
        assert [o[:3] for o in overlapping] == [o[:3] for o in one_after_the_other]
