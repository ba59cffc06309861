"""Decodes that share pages: read once for all of them, with the same result."""

import numpy as np
import pytest
import torch

from simple_flashinfer.attention import AttentionLayer, AttentionMetadata, backend_class
from simple_flashinfer.attention.flashinfer import _Cascade
from simple_flashinfer.types import RequestTable, SchedulerOutput
from test.attention import fake_flashinfer
from test.attention.recording import capture
from test.attention.test_contract import reference, run

PAGE = 16
PLAIN, SOFTCAP = AttentionLayer(0, 8, 2, 64, 64, 0.125), AttentionLayer(1, 2, 2, 64, 64, 0.3, softcap=3.0)
WINDOW = AttentionLayer(2, 4, 2, 64, 64, 0.125, sliding_window=40)
# pages that all share, and how many tokens each has beyond them
SHARED = {
    "one token each": (3, [1, 1, 1]),
    "pages that are just full": (2, [16, 1, 32, 17]),
    "very different lengths": (5, [1, 200, 15]),
    "two requests": (1, [2, 3]),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def make_backend(request, monkeypatch):
    if request.param == "cpu":
        fake_flashinfer.install(monkeypatch)
    monkeypatch.setattr("simple_flashinfer.attention.flashinfer._CASCADE_BYTES", 1)

    def make(layers, name="flashinfer", **options):
        options = {"num_pages": 100, "page_size": PAGE, "dtype": torch.bfloat16, **options}
        return backend_class(name)(layers, device=torch.device(request.param), **options)

    return make


def make_table(shared, own, more=()):
    """A row for each request: pages 0 .. shared - 1, then its own; and rows that share nothing."""
    table = RequestTable(len(own) + len(more), 1600, PAGE)
    pages = iter(range(shared, 100))
    for row, count in enumerate([*own, *more]):
        first = shared if row < len(own) else 0
        table.page_table[row, :first] = range(first)
        for column in range(first, first + -(-count // PAGE)):
            table.page_table[row, column] = next(pages)
    return table


def step(table, rows, before, added):
    rows, before, added = (np.array(x, np.int32) for x in (rows, before, added))
    return SchedulerOutput(rows, added, before, int((added == 1).sum()), np.ones(len(rows), np.bool_), table)


def check(backend, layer, shared, own, prompts=()):
    torch.manual_seed(len(own))
    kv = [torch.randn(shared * PAGE + max(own), len(own), 2, layer.num_kv_heads, 64).to(backend.dtype)]
    kv[0][: shared * PAGE] = kv[0][: shared * PAGE, :1]
    table, start = make_table(shared, own, prompts), shared * PAGE

    def append(row, first, last):
        if last > first:
            q = torch.zeros(last - first, layer.num_qo_heads, 64)
            k, v = kv[0][first:last, row].unbind(1)
            run(backend, layer, step(table, [row], [first], [last - first]), q, k, v, None)

    append(0, 0, start)
    for row, count in enumerate(own):
        append(row, start, start + count - 1)
    ends = [start + count - 1 for count in own]
    k, v = torch.stack([kv[0][end, row] for row, end in enumerate(ends)]).unbind(1)
    q = torch.randn(len(own) + sum(prompts), layer.num_qo_heads, 64).to(backend.dtype)
    new = torch.randn(2, sum(prompts), layer.num_kv_heads, 64).to(backend.dtype)
    rows = range(len(own) + len(prompts))
    batch = step(table, rows, [*ends, *[0] * len(prompts)], [*[1] * len(own), *prompts])
    out = run(backend, layer, batch, q, torch.cat([k, new[0]]), torch.cat([v, new[1]]), None)
    for row, end in enumerate(ends):
        k, v = kv[0][: end + 1, row].unbind(1)
        expected = reference(layer, q[row : row + 1], k, v, end)
        torch.testing.assert_close(out[row : row + 1].double(), expected, atol=2e-2, rtol=2e-2)
    if prompts:
        expected = reference(layer, q[len(own) :], *new, 0)
        torch.testing.assert_close(out[len(own) :].double(), expected, atol=2e-2, rtol=2e-2)
    return out


def used(backend):
    return [isinstance(decode, _Cascade) for decode in backend._running_decode.values()]


@pytest.mark.parametrize("case", SHARED)
@pytest.mark.parametrize("layer", [PLAIN, SOFTCAP, WINDOW], ids=["plain", "softcap", "window"])
def test_equals_the_definition_and_torch(make_backend, layer, case):
    backend = make_backend([layer])
    out = check(backend, layer, *SHARED[case])
    assert used(backend) == [layer is not WINDOW]
    plain = check(make_backend([layer], "sdpa"), layer, *SHARED[case])
    torch.testing.assert_close(out, plain, atol=1e-2, rtol=1e-2)


def test_beside_prompts_and_layers_of_another_kind(make_backend):
    for layers, expected in (([PLAIN, SOFTCAP], [True, True]), ([PLAIN, WINDOW], [False, False])):
        backend = make_backend(layers)
        for layer in layers:
            check(backend, layer, 4, [1, 30], prompts=[20])
        assert used(backend) == expected, "windows see other parts of what is shared"


def test_it_can_be_switched_off_and_needs_enough_to_share(make_backend, monkeypatch):
    backend = make_backend([PLAIN], cascade=False)
    check(backend, PLAIN, 4, [1, 30, 5])
    assert used(backend) == [False]
    backend = make_backend([PLAIN])
    page_bytes = PAGE * 2 * 2 * 64 * 2  # K and V, 2 heads of 64, 2 bytes
    for threshold, expected in ((2 * 4 * page_bytes, True), (2 * 4 * page_bytes + 1, False)):
        monkeypatch.setattr("simple_flashinfer.attention.flashinfer._CASCADE_BYTES", threshold)
        check(backend, PLAIN, 4, [1, 30, 5])
        assert used(backend) == [expected]


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [4, 2, 3]], 0),
        ([[1, 2, 3, 9], [1, 5, 3, 8]], 1),
        ([[1, 2, 3], [1, 2]], 1),
        ([[1], [1, 2, 3]], 0),
        ([[1, 2, 3]], 0),
        ([[1, 2, 3], [1, 2, 4], [1, 2, 3]], 2),
    ],
)
def test_what_is_shared_stands_in_the_page_table(pages, expected):
    table = RequestTable(len(pages), 1600, PAGE)
    for row, numbers in enumerate(pages):
        table.page_table[row, : len(numbers)] = numbers
    before = [len(numbers) * PAGE - 1 for numbers in pages]
    assert AttentionMetadata.of(step(table, range(len(pages)), before, [1] * len(pages))).num_shared_pages == expected
    # a prompt that shares the same pages is none of the decodes
    assert AttentionMetadata.of(step(table, range(len(pages)), before, [2] * len(pages))).num_shared_pages == 0


@pytest.mark.parametrize("size", [3, 4])
def test_in_a_graph(make_backend, monkeypatch, size):
    """With padding rows, replayed for other requests, and beside one without a cascade of the same size."""
    backend = make_backend([SOFTCAP])
    replays = {}
    generator = torch.Generator().manual_seed(size)
    inputs = [torch.zeros(size, heads, 64, dtype=backend.dtype, device=backend.device) for heads in (2, 2, 2)]
    for shared, own, threshold in (
        (3, [1, 5, 33], 1),
        (3, [1, 5, 33], 1 << 40),
        (5, [16, 1, 2], 1),
        (2, [7, 7, 7], 1 << 40),
    ):
        monkeypatch.setattr("simple_flashinfer.attention.flashinfer._CASCADE_BYTES", threshold)
        for cache in backend._caches.values():
            cache.copy_(torch.randn(cache.shape, generator=generator))
        before = [shared * PAGE + count - 1 for count in own]
        metadata = AttentionMetadata.of(step(make_table(shared, own), range(3), before, [1] * 3))
        for x in inputs:
            x[:3] = torch.randn(3, *x.shape[1:], generator=generator).to(x)
        backend.plan(metadata)
        expected = backend.run(1, *(x[:3] for x in inputs))
        cascade = backend.plan_graph(metadata, size)
        assert cascade == (threshold == 1)
        if cascade not in replays:
            replays[cascade] = capture(lambda: backend.run(1, *inputs))
        torch.testing.assert_close(replays[cascade]()[:3], expected, atol=1e-2, rtol=1e-2)
    assert len(replays) == 2


def test_when_there_are_too_many_page_numbers_for_a_graph(make_backend, monkeypatch):
    metadata = AttentionMetadata.of(step(make_table(3, [1, 1, 1]), range(3), [48] * 3, [1] * 3))
    assert not make_backend([PLAIN]).prefers_eager(metadata)
    assert not make_backend([PLAIN], "sdpa").prefers_eager(metadata)
    monkeypatch.setattr("simple_flashinfer.attention.flashinfer._MIN_GRAPH_INDICES", 1)
    few = make_backend([PLAIN], num_pages=11, cascade=False)
    assert few.prefers_eager(metadata), "twelve page numbers, though there are fewer pages"


def test_more_page_numbers_than_pages_in_a_graph(make_backend):
    backend = make_backend([PLAIN], num_pages=20)
    table = make_table(10, [1] * 8)
    q, k, v = torch.randn(8, 8, 64), torch.randn(8, 2, 64), torch.randn(8, 2, 64)
    q, k, v = (x.to(backend.device, backend.dtype) for x in (q, k, v))
    metadata = AttentionMetadata.of(step(table, range(8), [160] * 8, [1] * 8))
    assert len(metadata.kv_indices) == 88
    backend.plan_graph(metadata, 8)
    graph = backend.run(0, q, k, v)
    backend.plan(metadata)
    torch.testing.assert_close(backend.run(0, q, k, v), graph, atol=1e-2, rtol=1e-2)


def test_a_plan_waits_for_the_copies_of_the_last_one(make_backend):
    backend = make_backend([PLAIN])
    calls = []

    class Recorder:
        def synchronize(self):
            calls.append("wait")

        def record(self):
            calls.append("note")

    def planned(method):
        return lambda *args, **options: calls.append("plan") or method(*args, **options)

    backend._copied = Recorder()
    wrapper = backend._decode[next(iter(backend._decode))]
    wrapper.plan = planned(wrapper.plan)
    metadata = AttentionMetadata.of(step(make_table(0, [5, 6]), range(2), [4, 5], [1] * 2))
    backend.plan(metadata)
    assert calls == ["wait", "plan", "note"]
    backend.plan_graph(metadata, 2)
    assert calls == ["wait", "plan", "note", "wait", "note"], "the graph's wrappers are others"


def test_its_kernels_are_compiled_before_there_are_requests(make_backend, monkeypatch, caplog):
    backend = make_backend([PLAIN, SOFTCAP])
    ran = []
    for kind, wrapper in backend._shared.items():
        monkeypatch.setattr(
            wrapper, "run", lambda *args, kind=kind, run=wrapper.run, **options: ran.append(kind) or run(*args, **options)
        )
    backend.warm_up()
    assert sorted(kind.softcap for kind in ran) == [0, 3]
    check(backend, PLAIN, *SHARED["two requests"])
    make_backend([WINDOW]).warm_up()  # has none

    def fails(*args, **options):
        raise RuntimeError("nvcc was not found")

    monkeypatch.setattr(next(iter(backend._shared.values())), "plan", fails)
    backend.warm_up()
    assert "nvcc was not found" in caplog.text
    assert not backend._shared
    check(backend, PLAIN, *SHARED["two requests"])
    assert used(backend) == [False, False]
