"""What every attention backend must do, on every backend; FlashInfer's on the stand-in, or on a CUDA device."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from simple_flashinfer.attention import AttentionLayer, AttentionMetadata, UnsupportedLayerError, backend_class
from simple_flashinfer.attention.compare import ComparingBackend
from simple_flashinfer.kernels.compiler import compiler
from simple_flashinfer.kernels.cpu import PAGE_MULTIPLE
from simple_flashinfer.types import RequestTable, SchedulerOutput
from test.attention import fake_flashinfer

LAYERS = {
    "plain": AttentionLayer(0, 6, 2, 64, 64, 64**-0.5),
    "group 1": AttentionLayer(1, 2, 2, 64, 64, 0.2),
    "group 8": AttentionLayer(2, 8, 1, 128, 128, 128**-0.5),
    "window": AttentionLayer(3, 4, 2, 64, 64, 0.125, sliding_window=21),
    "window 1": AttentionLayer(4, 4, 2, 64, 64, 0.125, sliding_window=1),
    "softcap": AttentionLayer(5, 4, 2, 64, 64, 0.3, softcap=3.0),
    "window and softcap": AttentionLayer(6, 4, 2, 64, 64, 0.3, sliding_window=33, softcap=3.0),
}
SINKS = AttentionLayer(7, 4, 2, 64, 64, 0.125, sliding_window=20, has_sinks=True)
NARROW_VALUES = AttentionLayer(8, 4, 4, 24, 16, 0.2)

# lengths before a step, and the tokens that the step adds
STEPS = {
    "prompts around the page": ([0] * 5, [1, 15, 16, 17, 32]),
    "one token prompts": ([0, 0], [1, 1]),
    "decode": ([15, 16, 17, 31, 100, 1], [1] * 6),
    "decode of very different lengths": ([3, 4, 90, 250, 251, 7], [1] * 6),
    "long decode": ([1300, 511, 512, 40], [1] * 4),
    "chunks": ([7, 16, 33, 64], [7, 16, 5, 2]),
    "mixed": ([40, 15, 31, 0, 20, 0], [1, 1, 1, 17, 12, 2]),
    "long": ([0, 100], [300, 200]),
}


@pytest.fixture(params=["sdpa", "cpu", "flashinfer", pytest.param("flashinfer cuda", marks=pytest.mark.gpu)])
def make_backend(request, monkeypatch):
    name, _, device = request.param.partition(" ")
    if name == "cpu" and compiler() is None:
        pytest.skip("there is no C++ compiler")
    if name == "flashinfer" and not device:
        fake_flashinfer.install(monkeypatch)

    def make(layers, page_size, dtype, num_pages=200, **options):
        options = {"num_pages": num_pages, "page_size": page_size, "dtype": dtype, **options}
        return backend_class(name)(layers, device=torch.device(device or "cpu"), **options)

    make.name = name
    return make


@dataclass
class Batch:
    """A table of requests with random pages, as the scheduler would leave it."""

    table: RequestTable
    output: SchedulerOutput
    lengths: list[int]


def make_batch(before, added, page_size, generator):
    table = RequestTable(len(before) + 3, 1600, page_size)
    rows = generator.permutation(len(before) + 3)[: len(before)].astype(np.int32)
    pages = generator.permutation(200).astype(np.int32)
    for row, computed, new in zip(rows, before, added, strict=True):
        count = -(-(computed + new) // page_size)
        table.page_table[row, :count], pages = pages[:count], pages[count:]
        table.num_pages[row] = count
        table.num_tokens[row] = computed + new
    before, added = np.array(before, np.int32), np.array(added, np.int32)
    assert (np.diff((added > 1).astype(int)) >= 0).all(), "one-token requests stand first"
    output = SchedulerOutput(rows, added, before, int((added == 1).sum()), np.ones(len(rows), np.bool_), table)
    return Batch(table, output, (before + added).tolist())


def reference(layer, q, k, v, computed, sinks=None):
    """One request, float64, a query at a time, from the definition."""
    out = torch.empty(len(q), layer.num_qo_heads, layer.head_dim_vo, dtype=torch.float64)
    group = layer.num_qo_heads // layer.num_kv_heads
    for i in range(len(q)):
        position = computed + i
        first = 0 if layer.sliding_window is None else max(0, position - layer.sliding_window + 1)
        for head in range(layer.num_qo_heads):
            keys, values = (x[first : position + 1, head // group].double() for x in (k, v))
            scores = keys @ q[i, head].double() * layer.scaling
            if layer.softcap:
                scores = layer.softcap * torch.tanh(scores / layer.softcap)
            if sinks is not None:
                weights = torch.cat([scores, sinks[head : head + 1].double()]).softmax(0)[:-1]
            else:
                weights = scores.softmax(0)
            out[i, head] = weights @ values
    return out


def check_step(backend, layer, before, added, dtype, generator, tolerance, sinks=None, kept=lambda x: x):
    batch = make_batch(before, added, backend.page_size, generator)
    torch.manual_seed(int(generator.integers(1 << 30)))
    total = sum(batch.lengths)
    keys = torch.randn(total, layer.num_kv_heads, layer.head_dim_qk).to(dtype)
    values = torch.randn(total, layer.num_kv_heads, layer.head_dim_vo).to(dtype)
    starts = np.cumsum([0, *batch.lengths])[:-1]
    if any(before):  # first everything that came before, as one prefill
        old = [i for i, computed in enumerate(before) if computed]
        order = sorted(old, key=lambda i: before[i] > 1)
        previous = SchedulerOutput(
            batch.output.rows[order],
            np.array([before[i] for i in order], np.int32),
            np.zeros(len(order), np.int32),
            sum(before[i] == 1 for i in order),
            np.ones(len(order), np.bool_),
            batch.table,
        )
        picked = torch.cat([torch.arange(starts[i], starts[i] + before[i]) for i in order])
        run(
            backend,
            layer,
            previous,
            torch.zeros(len(picked), layer.num_qo_heads, layer.head_dim_qk),
            keys[picked],
            values[picked],
            sinks,
        )
    picked = torch.cat([torch.arange(s + b, s + b + a) for s, b, a in zip(starts, before, added, strict=True)])
    queries = torch.randn(len(picked), layer.num_qo_heads, layer.head_dim_qk).to(dtype)
    out = run(backend, layer, batch.output, queries, keys[picked], values[picked], sinks)
    offset = 0
    for start, computed, new in zip(starts, before, added, strict=True):
        k, v = (kept(x[start : start + computed + new]) for x in (keys, values))
        expected = reference(layer, queries[offset : offset + new], k, v, computed, sinks)
        torch.testing.assert_close(out[offset : offset + new].double(), expected, atol=tolerance, rtol=tolerance)
        offset += new


def run(backend, layer, output, q, k, v, sinks):
    backend.plan(AttentionMetadata.of(output))
    # as HF gives them: views of [1, heads, T, dim]
    q, k, v = (x.to(backend.dtype).transpose(0, 1).contiguous().transpose(0, 1).to(backend.device) for x in (q, k, v))
    return backend.run(layer.layer_idx, q, k, v, sinks).cpu()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_definition(make_backend, name, step):
    dtype, tolerance = (torch.float32, 2e-5) if make_backend.name in ("sdpa", "cpu") else (torch.bfloat16, 2e-2)
    backend = make_backend(list(LAYERS.values()), 16, dtype)
    check_step(backend, LAYERS[name], *STEPS[step], dtype, np.random.default_rng(1), tolerance)


@pytest.mark.parametrize("page_size", [1, 5, 32, 48])
def test_page_sizes(make_backend, page_size):
    if make_backend.name == "cpu" and page_size % PAGE_MULTIPLE:
        with pytest.raises(ValueError, match="a multiple of 16"):
            make_backend([LAYERS["window"]], page_size, torch.bfloat16)
        return
    backend = make_backend([LAYERS["window"]], page_size, torch.bfloat16)
    check_step(backend, LAYERS["window"], [40, 15, 0], [1, 1, 30], torch.bfloat16, np.random.default_rng(2), 2e-2)


def test_sixteen_bit(make_backend):
    for dtype in (torch.float16, torch.bfloat16):
        backend = make_backend([LAYERS["plain"]], 16, dtype)
        check_step(backend, LAYERS["plain"], *STEPS["mixed"], dtype, np.random.default_rng(3), 2e-2)


# the kernels for the CPU read what they compute in
in_eight_bits = pytest.mark.parametrize(
    "make_backend", ["sdpa", "flashinfer", pytest.param("flashinfer cuda", marks=pytest.mark.gpu)], indirect=True
)


@in_eight_bits
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["plain", "window and softcap"])
def test_keys_and_values_kept_in_eight_bits(make_backend, name, step):
    """As if they had been rounded before, and nothing else."""
    backend = make_backend([LAYERS[name]], 16, torch.bfloat16, kv_dtype=torch.float8_e4m3fn)
    generator = np.random.default_rng(9)
    kept = lambda x: x.to(torch.float8_e4m3fn).to(x.dtype)  # noqa: E731
    check_step(backend, LAYERS[name], *STEPS[step], torch.bfloat16, generator, 2e-2, kept=kept)


@in_eight_bits
def test_what_eight_bits_can_not_hold_becomes_their_largest(make_backend):
    layer = LAYERS["plain"]
    backend = make_backend([layer], 16, torch.bfloat16, kv_dtype=torch.float8_e4m3fn)
    batch = make_batch([0], [4], 16, np.random.default_rng(10))
    k = torch.tensor([1e30, -500, 448, 0.1])[:, None, None].expand(4, 2, 64)
    run(backend, layer, batch.output, torch.zeros(4, 6, 64), k, -k, None)
    page = torch.tensor([batch.table.page_table[batch.output.rows[0], 0]], device=backend.device)
    expected = torch.tensor([448, -448, 448, 0.1015625])
    for cache, sign in zip(backend.gather(0, page), (1, -1), strict=True):
        assert cache.dtype == torch.bfloat16
        assert torch.equal(cache[1, :4, 7].cpu().float(), sign * expected)


@pytest.fixture(params=["sdpa", "cpu"])
def make_cpu_backend(request):
    if request.param == "cpu" and compiler() is None:
        pytest.skip("there is no C++ compiler")

    def make(*layers):
        options = {"num_pages": 200, "page_size": 16, "dtype": torch.float32, "device": torch.device("cpu")}
        return backend_class(request.param)(layers, **options)

    return make


@pytest.mark.parametrize("step", STEPS)
def test_sinks(make_cpu_backend, step):
    sinks = torch.tensor([0.0, 1, -1, 3])
    backend = make_cpu_backend(SINKS)
    check_step(backend, SINKS, *STEPS[step], torch.float32, np.random.default_rng(4), 2e-5, sinks)


@pytest.mark.parametrize("step", STEPS)
def test_unequal_dimensions_in_torch(step):
    backend = backend_class("sdpa")(
        [NARROW_VALUES], num_pages=200, page_size=16, dtype=torch.float32, device=torch.device("cpu")
    )
    check_step(backend, NARROW_VALUES, *STEPS[step], torch.float32, np.random.default_rng(5), 2e-5)


@pytest.mark.parametrize(
    ("layer", "dtype", "reason"),
    [
        (SINKS, torch.bfloat16, "layer 7 .* sinks"),
        (NARROW_VALUES, torch.bfloat16, "layer 8 .* keys of 24 and values of 16"),
        (AttentionLayer(9, 4, 4, 80, 80, 0.1), torch.bfloat16, "layer 9 .* head_dim of 80"),
        (LAYERS["plain"], torch.float32, "float32 .*--torch_dtype_autocast"),
    ],
)
def test_flashinfer_refuses_what_it_would_compute_wrongly(monkeypatch, layer, dtype, reason):
    fake_flashinfer.install(monkeypatch)
    with pytest.raises(UnsupportedLayerError, match=reason):
        backend_class("flashinfer")([layer], num_pages=4, page_size=16, dtype=dtype, device=torch.device("cpu"))


def test_without_the_library_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'simple-flashinfer\[cuda\]'"):
        backend_class("flashinfer")


def test_comparing_changes_nothing_and_reports_each_layer(make_backend, caplog):
    dtype = torch.bfloat16
    layers = list(LAYERS.values())
    comparing = ComparingBackend(make_backend(layers, 16, dtype))
    caplog.set_level("INFO")
    for layer in layers:
        check_step(comparing, layer, *STEPS["mixed"], dtype, np.random.default_rng(6), 2e-2)
    for layer in layers:
        lines = [message for message in caplog.messages if message.startswith(f"layer {layer.layer_idx}:")]
        assert len(lines) == 2, "the prefill before, and the mixed step"
        assert all(float(line.split()[-1]) < 2e-2 for line in lines)


def test_what_one_request_computes_wrongly_does_not_stay_in_the_pages(make_cpu_backend):
    layer = LAYERS["plain"]
    backend = make_cpu_backend(layer)
    batch = make_batch([0], [160], 16, np.random.default_rng(8))
    bad = torch.full((160, 2, 64), torch.nan)
    run(backend, layer, batch.output, torch.zeros(160, 6, 64), bad, bad, None)
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 6, 64), torch.randn(5, 2, 64), torch.randn(5, 2, 64)
    first = SchedulerOutput(
        batch.output.rows, np.array([4], np.int32), np.zeros(1, np.int32), 0, np.ones(1, np.bool_), batch.table
    )
    then = SchedulerOutput(
        batch.output.rows, np.array([1], np.int32), np.array([4], np.int32), 1, np.ones(1, np.bool_), batch.table
    )
    run(backend, layer, first, q[:4], k[:4], v[:4], None)
    out = run(backend, layer, then, q[4:], k[4:], v[4:], None)
    torch.testing.assert_close(out.double(), reference(layer, q[4:], k, v, 4), atol=2e-5, rtol=2e-5)


def test_metadata_at_exact_multiples_of_the_page():
    batch = make_batch([15, 16, 31, 0], [1, 1, 1, 32], 16, np.random.default_rng(7))
    metadata = AttentionMetadata.of(batch.output)
    assert metadata.kv_last_page_len.tolist() == [16, 1, 16, 16]
    assert np.diff(metadata.kv_indptr).tolist() == [1, 2, 2, 2]
    assert metadata.positions.tolist() == [15, 16, 31, *range(32)]
    assert metadata.batch_indices.tolist() == [0, 1, 2, *[3] * 32]
