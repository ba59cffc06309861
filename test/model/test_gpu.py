"""End to end on a CUDA device: FlashInfer's kernels under real models, held to transformers in float32."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from simple_flashinfer import LLM, SamplingParams
from simple_flashinfer.attention import AttentionLayer, AttentionMetadata, backend_class
from simple_flashinfer.config import ConfigError
from simple_flashinfer.model.cuda_graph import CudaCapture
from simple_flashinfer.model.fused_layers import FusedMLP, FusedRMSNorm, RotaryTable
from test.attention.test_cascade import make_table, step

pytestmark = pytest.mark.gpu

LENGTH = 40
# what a random model leaves of its tokens when K and V are in e4m3 (57 % and 1.3 in torch); wrong ones: 1 %, 5.7
EIGHT_BITS = {"best": 0.4, "most": 2.0, "kv_cache_dtype": "fp8"}
GREEDY = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)


@pytest.fixture(scope="module", params=[64, 128], ids=["head_dim 64", "head_dim 128"])
def model(request, tmp_path_factory, random_model):
    folder = tmp_path_factory.mktemp("gpu")
    torch.manual_seed(request.param)
    config = LlamaConfig(
        vocab_size=2000, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=request.param, max_position_embeddings=4096, initializer_range=0.1,
    )  # fmt: skip
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    reference.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).write_bytes((Path(random_model) / file).read_bytes())
    prompts = [torch.randint(3, 2000, (length,)).tolist() for length in (1, 15, 16, 17, 31, 32, 33, 100, 700)]
    return str(folder), reference.cuda(), prompts


def check(model, prompts=None, cached=(), best=0.8, most=0.3, **settings):
    """Every token that was chosen is, in float32, the best one but for what is rounded away: a share of `best` is the very
    best, and none is further off than `most` deviations of the logits.
    """
    path, reference, own_prompts = model
    prompts = prompts or own_prompts
    llm = LLM(path, device="cuda", torch_dtype="bfloat16", **{"max_model_len": 2048, **settings})
    llm.generate(list(cached), GREEDY, use_tqdm=False)
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    gaps = []
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output.token_ids) == LENGTH
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + output.token_ids], device="cuda")).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(output.token_ids, device="cuda")[:, None])[:, 0]
        gaps.append((logits.max(-1).values - chosen) / logits.std(-1))
    gap = torch.cat(gaps)
    assert (gap == 0).float().mean() > best
    assert gap.max() < most
    assert llm.stats.num_free_pages == llm.info.num_pages
    assert (llm.stats.num_preemptions > 0) == ("kv_cache_memory" in settings)
    llm.core.scheduler.check()
    return [output.token_ids for output in outputs]


def test_flashinfer(model):
    check(model)


def test_chunked(model):
    check(model, max_num_batched_tokens=48)


def test_cuda_graphs_give_the_same_tokens(model):
    plain, graphs = check(model), check(model, cuda_graph=True)
    same = [a == b for x, y in zip(plain, graphs, strict=True) for a, b in zip(x, y, strict=True)]
    assert sum(same) > 0.8 * len(same), "padding changes the split of the work, and so the rounding"


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_compiled(model):
    check(model, torch_compile=True)


def test_torch_attention_on_the_device(model):
    check(model, attention_backend="sdpa")


def test_preemption(model):
    bytes_per_token = 4 * 2 * 2 * 2 * model[1].config.head_dim
    # 21 pages at the start, 41 at the end, and 30 that there are
    check(model, model[2][:-1], max_model_len=256, kv_cache_memory=480 * bytes_per_token)


def test_small_layers_are_fused_and_can_be_left_alone(model):
    fused = LLM(model[0], device="cuda", torch_dtype="bfloat16", max_model_len=2048)
    kinds = {type(module) for module in fused.core.executor.model.modules()}
    assert {FusedMLP, FusedRMSNorm, RotaryTable} <= kinds
    assert all("forward" in vars(layer.self_attn) for layer in fused.core.executor.model.model.layers), "its rope is fused"
    assert fused.core.executor._whole is not None, "and whole layers are one call"
    del fused
    check(model, fuse=False)
    check(model, fuse=False, cuda_graph=True)


@pytest.mark.parametrize("backend", ["flashinfer", "sdpa"])
def test_keys_and_values_in_eight_bits(model, backend):
    check(model, attention_backend=backend, **EIGHT_BITS)


def test_keys_and_values_in_eight_bits_in_graphs(model):
    check(model, cuda_graph=True, **EIGHT_BITS)


@pytest.mark.parametrize("settings", [{}, {"cuda_graph": True}, {"max_num_batched_tokens": 48}, {"cascade": False}])
def test_requests_that_share_a_long_prompt(monkeypatch, model, settings):
    """Cascades, but in graphs; and a graph gets more page numbers than there are pages in use."""
    monkeypatch.setattr("simple_flashinfer.attention.flashinfer._CASCADE_BYTES", 1)
    prefix = model[2][-1][:650]
    check(model, [prefix + [5 + i] * (1 + 7 * i) for i in range(24)], cached=[prefix], most=0.5, **settings)


def make_backend():
    layers = [AttentionLayer(0, 8, 2, 64, 64, 0.125), AttentionLayer(1, 8, 2, 64, 64, 0.125, sliding_window=40)]
    options = {"num_pages": 100, "page_size": 16, "dtype": torch.bfloat16, "device": torch.device("cuda")}
    return layers, backend_class("flashinfer")(layers, **options)


def test_memory_beside_the_pages_is_as_reckoned():
    before = torch.cuda.memory_allocated()
    layers, backend = make_backend()
    metadata = AttentionMetadata.of(step(make_table(0, [5]), [0], [4], [1]))
    for size in (1, 2, 4):
        backend.plan_graph(metadata, size)
    pages = sum(cache.nbytes for cache in backend._caches.values())
    taken, reckoned = torch.cuda.memory_allocated() - before - pages, backend.workspace_bytes(layers, 3)
    assert 0.95 * reckoned < taken <= reckoned


def test_a_decode_that_waits_for_the_device_is_not_recorded():
    x = torch.arange(3.0, device="cuda")

    def waits():
        return x * x.sum().item(), x

    def goes_on():
        return x * x.sum(), x

    capture = CudaCapture()
    assert capture(waits) is waits
    replay = CudaCapture()(goes_on)
    assert replay is not goes_on
    x += 1
    assert replay()[0].tolist() == [6, 12, 18]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_planning_does_not_wait_for_the_device():
    _, backend = make_backend()
    table = make_table(3, [20, 30], [40])
    mixed = AttentionMetadata.of(step(table, range(3), [60, 70, 0], [1, 1, 40]))
    decodes = AttentionMetadata.of(step(table, range(2), [60, 70], [1, 1]))

    def run(metadata):
        q, k, v = (torch.randn(len(metadata.positions), heads, 64, device=backend.device).bfloat16() for heads in (8, 2, 2))
        for layer in range(2):
            backend.run(layer, q, k, v)

    def steps():
        backend.plan(mixed)
        run(mixed)
        for threshold in (1, 1 << 60):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("simple_flashinfer.attention.flashinfer._CASCADE_BYTES", threshold)
                backend.plan(decodes)
                run(decodes)
        backend.plan_graph(decodes, 2)
        run(decodes)

    steps()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_running_out_of_memory_at_start_is_told_in_a_sentence(model):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.02)
    try:
        with pytest.raises(ConfigError, match="too little free memory for the KV cache; lower --memory_utilization"):
            LLM(model[0], device="cuda", torch_dtype="bfloat16", max_sequence=1024, kv_cache_memory=6 << 30)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
