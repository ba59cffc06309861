import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from simple_flashinfer.kernels.compiler import compiler
from simple_flashinfer.kernels.cpu import cpu_kernels
from simple_flashinfer.kernels.cuda import CudaKernels
from simple_flashinfer.sampling import SamplingBatch, gather_logprobs, sample
from simple_flashinfer.sampling.processors import LogitsProcessors, ProcessedRow, apply_processors
from simple_flashinfer.sampling.sampler import INVALID_TOKEN, uniforms
from test.attention import fake_flashinfer

needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
by_torch_and_by_kernel = pytest.mark.parametrize(
    "sample",
    [
        pytest.param(sample, id="torch"),
        pytest.param(
            lambda logits, *args: sample(logits, *args, draw=cpu_kernels(logits.dtype).draw),
            id="kernel",
            marks=needs_compiler,
        ),
    ],
)


def batch(size, temperature=1.0, top_k=0, top_p=0.0, min_p=0.0, typical_p=0.0, seeds=None, positions=None, processed=()):
    def column(value, dtype):
        return np.broadcast_to(np.asarray(value, dtype), (size,)).copy()

    return SamplingBatch(
        temperature=column(temperature, np.float32),
        top_k=column(top_k, np.int32),
        top_p=column(top_p, np.float32),
        min_p=column(min_p, np.float32),
        typical_p=column(typical_p, np.float32),
        seeds=column(np.arange(size) if seeds is None else seeds, np.uint64),
        positions=column(0 if positions is None else positions, np.int64),
        processed=list(processed),
    )


@by_torch_and_by_kernel
def test_temperature_zero_is_argmax(sample):
    logits = torch.randn(50, 1000)
    assert sample(logits, batch(50, temperature=0, top_k=5, top_p=0.5)).tolist() == logits.argmax(-1).tolist()


@by_torch_and_by_kernel
@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({}, []),
        ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.7, "top_k": 12, "top_p": 0.8, "min_p": 0.06},
            [TemperatureLogitsWarper(1.7), TopKLogitsWarper(12), TopPLogitsWarper(0.8), MinPLogitsWarper(0.06)],
        ),
    ],
)
def test_draws_follow_the_distribution_that_hf_draws_from(sample, options, warpers):
    torch.manual_seed(1)
    logits, draws = torch.randn(30) * 2, 40_000
    probabilities = LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())[0].softmax(-1)
    tokens = sample(logits.expand(draws, -1), batch(draws, **options))
    frequencies = torch.bincount(tokens, minlength=30) / draws
    assert not frequencies[probabilities == 0].any(), "a filtered token was drawn"
    deviation = (frequencies - probabilities) / (probabilities * (1 - probabilities) / draws).sqrt().clamp_min(1e-9)
    assert deviation[probabilities > 0].abs().max() < 5


@by_torch_and_by_kernel
@pytest.mark.parametrize("vocabulary", [3000, 40])
def test_top_p_beyond_the_first_look(sample, vocabulary):
    """Flat logits: the nucleus is larger than the part of the vocabulary that is looked at first."""
    torch.manual_seed(2)
    logits, draws = torch.randn(vocabulary) * 0.01, 3000
    warped = TopPLogitsWarper(0.9)(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())[0]
    tokens = sample(logits.expand(draws, -1), batch(draws, top_p=0.9))
    assert torch.isfinite(warped[tokens]).all()
    assert len(tokens.unique()) > 0.9 * 0.55 * vocabulary


@by_torch_and_by_kernel
@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.3, 1.0, 2.5]),
            st.sampled_from([0, 1, 3, 50, 10_000]),
            st.sampled_from([0.0, 0.2, 0.95, 1.0]),
            st.sampled_from([0.0, 0.05]),
            st.integers(0, 2**64 - 1),
            st.integers(0, 10_000),
        ),
        min_size=1,
        max_size=8,
    ),
    ties=st.booleans(),
)
def test_a_draw_depends_on_seed_and_position_only(sample, rows, ties):
    """The same row alone, and among others in any order, gives the same token, ties included."""
    generator = torch.Generator().manual_seed(len(rows))
    logits = torch.randn(len(rows), 1500, generator=generator) * 3
    if ties:
        logits = logits.round()
    columns = dict(
        zip(("temperature", "top_k", "top_p", "min_p", "seeds", "positions"), zip(*rows, strict=True), strict=True)
    )
    together = sample(logits, batch(len(rows), **columns))
    reverse = sample(logits.flip(0), batch(len(rows), **{name: values[::-1] for name, values in columns.items()})).flip(0)
    alone = [
        sample(logits[i : i + 1], batch(1, **{name: values[i] for name, values in columns.items()}))[0]
        for i in range(len(rows))
    ]
    assert together.tolist() == reverse.tolist() == [int(token) for token in alone]


def test_uniforms_are_uniform_and_independent():
    seeds, positions = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(300), indexing="ij")
    numbers = uniforms(seeds, positions)
    assert 0 <= numbers.min() <= numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(numbers[:-1].ravel(), numbers[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.02


@by_torch_and_by_kernel
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_told(sample, bad):
    logits = torch.zeros(3, 10)
    logits[1, 4] = bad
    tokens = sample(logits, batch(3, temperature=[0, 1, 0]))
    assert tokens[1] == INVALID_TOKEN
    assert (tokens[[0, 2]] >= 0).all()


def test_repetition_penalty_is_hf_s_and_counts_the_prompt():
    logits = torch.randn(1, 40)
    tokens = np.array([3, 3, 5, 7, 7, 7], np.int32)
    row = ProcessedRow(0, tokens, 3, LogitsProcessors(repetition=1.7))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(tokens[None].astype(np.int64)), logits.clone())
    torch.testing.assert_close(apply_processors(logits, [row]), expected)
    assert (apply_processors(logits, [row])[0, [3, 5, 7]] < logits[0, [3, 5, 7]]).all(), "a penalty makes less likely"


def test_presence_and_frequency_count_the_output_alone():
    logits = torch.randn(2, 40)
    tokens = np.array([3, 3, 5, 7, 7, 9], np.int32)
    row = ProcessedRow(1, tokens, 3, LogitsProcessors(presence=0.5, frequency=0.25))
    expected = logits.clone()
    expected[1, 7] -= 0.5 + 2 * 0.25
    expected[1, 9] -= 0.5 + 0.25
    torch.testing.assert_close(apply_processors(logits, [row]), expected)


@by_torch_and_by_kernel
def test_penalties_count_before_anything_else(sample):
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    row = ProcessedRow(0, np.array([2, 0], np.int32), 1, LogitsProcessors(presence=0.5))
    assert sample(logits, batch(1, temperature=0, processed=[row])).tolist() == [1]


@by_torch_and_by_kernel
@pytest.mark.parametrize("mass", [0.2, 0.5, 0.95])
def test_typical_p_keeps_the_tokens_that_transformers_keeps(sample, mass):
    logits = torch.randn(1, 40) * 3
    kept = torch.isfinite(TypicalLogitsWarper(mass=mass)(None, logits.clone()))[0]
    drawn = sample(logits.expand(4000, -1), batch(4000, typical_p=mass)).unique()
    assert set(drawn.tolist()) <= set(kept.nonzero()[:, 0].tolist())
    likely = torch.softmax(logits.masked_fill(~kept, -torch.inf), -1)[0] > 0.01
    assert set(likely.nonzero()[:, 0].tolist()) <= set(drawn.tolist())


@by_torch_and_by_kernel
def test_what_processors_forbid_is_never_drawn(sample):
    logits = torch.randn(200, 8)
    tokens = np.array([7, 1, 2], np.int32)  # a prompt of one token, and two of output
    processors = LogitsProcessors(
        bias={3: -100.0}, allowed=(3, 4, 5, 6), banned=((1, 2, 4), (2, 5), (1, 6)), min_tokens=3, ending=(0,)
    )
    rows = [ProcessedRow(i, tokens, 1, processors) for i in range(200)]
    # 4 and 5 would complete a bad word; 6 would not, because the token before it is another
    assert set(sample(logits, batch(200, processed=rows)).tolist()) == {6}
    late = [ProcessedRow(i, tokens, 1, LogitsProcessors(min_tokens=2, ending=(0,))) for i in range(200)]
    assert 0 in sample(logits, batch(200, processed=late)).tolist()


def test_a_bias_is_added():
    logits = torch.zeros(1, 5)
    rows = [ProcessedRow(0, np.array([0], np.int32), 1, LogitsProcessors(bias={2: 1.5, 4: -2.0}))]
    torch.testing.assert_close(apply_processors(logits, rows), torch.tensor([[0, 0, 1.5, 0, -2.0]]))


def test_the_device_s_kernels_for_top_k_and_top_p_leave_the_same_tokens(monkeypatch):
    fake_flashinfer.install(monkeypatch)
    torch.manual_seed(0)
    logits = torch.randn(40, 3000) * 2
    many = batch(
        40,
        temperature=[0.0, *np.linspace(0.5, 1.5, 39)],
        top_k=[0, 5, 3000, 40] * 10,
        top_p=[0.0, 0.9, 0.5, 1.0, 0.3] * 8,
        min_p=[0.0, 0.0, 0.02] * 13 + [0.5],
        seeds=range(40),
        positions=range(40),
    )
    plain, by_kernel = sample(logits, many), sample(logits, many, CudaKernels().filter_probs)
    assert (plain == by_kernel).float().mean() > 0.9, "sums are rounded in another order"
    narrow = batch(40, temperature=1.0, top_k=[1, 2] * 20, seeds=range(40), positions=range(40))
    assert (sample(logits, narrow) == sample(logits, narrow, CudaKernels().filter_probs)).all()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_draws_what_torch_draws(dtype):
    torch.manual_seed(0)
    draw = cpu_kernels(dtype).draw
    for rows, vocab, scale in ((0, 7, 1), (1, 1, 1), (7, 17, 1), (400, 5000, 1), (60, 3000, 30), (40, 3000, 0)):
        for options in (
            {"temperature": 0}, {}, {"top_k": 40}, {"top_p": 0.9}, {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
            {"min_p": 0.1, "top_k": 900}, {"temperature": 1.5, "top_p": 0.999}, {"top_k": 4999, "top_p": 0.01},
        ):  # fmt: skip
            logits = (torch.randn(rows, vocab) * scale).to(dtype)
            parameters = batch(rows, positions=range(rows), **options)
            got, expected = sample(logits, parameters, draw=draw), sample(logits, parameters)
            if options == {"temperature": 0} and scale:
                assert torch.equal(logits.float().gather(1, got[:, None]), logits.float().max(1, keepdim=True).values)
            else:
                assert (got != expected).float().sum() <= 0.03 * rows, "sums are rounded in another order"
            assert ((got >= 0) & (got < vocab)).all()
    rows = torch.zeros(7, 100, dtype=dtype)
    rows[0, 7], rows[1, 99], rows[2], rows[4, 50], rows[5, [60, 40]] = torch.nan, torch.inf, -torch.inf, -torch.inf, 3
    rows[6], rows[6, 30] = -torch.inf, -5
    drawn = sample(rows, batch(7, temperature=[0, 1, 0, 0, 0, 0, 1]), draw=draw).tolist()
    assert drawn == [INVALID_TOKEN, INVALID_TOKEN, INVALID_TOKEN, 0, 0, 40, 30]
    part = torch.randn(4, 300).to(dtype)[:, 100:200]
    assert sample(part, batch(4, temperature=0), draw=draw).tolist() == part.argmax(-1).tolist()


def test_logprobs_are_the_log_softmax():
    logits = torch.randn(3, 20)
    found = gather_logprobs(logits, torch.tensor([4, 9, 0]), [2, 0, 20])()
    for row, (token, entry) in enumerate(zip([4, 9, 0], found, strict=True)):
        expected = torch.log_softmax(logits[row], -1)
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(expected[token].item(), abs=1e-6)
        assert entry.rank == (expected > expected[token]).sum() + 1
    assert [len(entry.top) for entry in found] == [2, 0, 20]
    assert [token for token, _ in found[2].top] == logits[2].argsort(descending=True).tolist()
