"""Fusing changes how fast a model computes, not what."""

import copy
import functools
import gc
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaRMSNorm

from simple_flashinfer import LLM, SamplingParams
from simple_flashinfer.config import ConfigError
from simple_flashinfer.kernels.compiler import compiler
from simple_flashinfer.kernels.cpu import cpu_kernels
from simple_flashinfer.kernels.cuda import CudaKernels
from simple_flashinfer.model.fuse import FusedLinear, FusedPart, fuse
from simple_flashinfer.model.fused_layers import fuse_layers
from test.attention import fake_flashinfer
from test.conftest import ARCHITECTURES, OUTPUT_LENGTH

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


def fused_copy(model, dtype):
    fused, kernels = copy.deepcopy(model), cpu_kernels(dtype)
    fuse(fused, kernels.pack)
    fuse_layers(fused, dtype, kernels, 512)
    return fused


def with_head_dim(head_dim, name):
    config = copy.deepcopy(ARCHITECTURES[name])
    config.head_dim = head_dim
    return config


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_the_same(name, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name], dtype=dtype).eval()
    fused = fused_copy(model, dtype)
    assert not [n for n, m in fused.named_modules() if type(m) is nn.Linear], "every projection is packed"
    check_modules(name, fused)
    ids = torch.randint(2, 512, (1, 37))
    with torch.inference_mode():
        expected, got = model(ids, use_cache=False).logits, fused(ids, use_cache=False).logits
    scale = expected.float().abs().max()
    assert (expected.float() - got.float()).abs().max() < scale * TOLERANCE[dtype]


def check_modules(name, fused):
    kinds = {type(module).__name__ for module in fused.modules()}
    assert ("FusedRMSNorm" in kinds) == (name != "gemma2"), "gemma's norm is 1 + weight"
    assert ("FusedMLP" in kinds) == (name not in ("gemma2", "mixtral")), "gemma's gate is a GELU, mixtral's MLPs are experts"
    assert "RotaryTable" in kinds
    assert all("forward" in vars(m) for n, m in fused.named_modules() if n.endswith("self_attn")), "its rope is fused"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_the_same_with_flashinfer(monkeypatch, name, dtype, device):
    """On a CUDA device, or over the stand-in."""
    if device == "cpu":
        fake_flashinfer.install(monkeypatch)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(with_head_dim(64, name), dtype=dtype).eval().to(device)
    fused = copy.deepcopy(model)
    fuse(fused)
    fuse_layers(fused, dtype, CudaKernels(), 512)
    check_modules(name, fused)
    ids = torch.randint(2, 512, (1, 37)).to(device)
    with torch.inference_mode():
        exact, plain, got = (m(ids, use_cache=False).logits.float() for m in (copy.deepcopy(model).float(), model, fused))
    # kernels round once where a chain of operators rounds after each: as far from float32 as that, or nearer; the median
    # token, since a rounding may send one to another expert
    assert not torch.equal(got, plain)
    errors = [(logits - exact).norm(dim=-1).median() for logits in (got, plain)]
    assert errors[0] < 1.2 * errors[1]


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(16, 2), (64, 64), (65, 34), (7, 1030), (200, 576), (960, 1536)])
def test_packed_matmuls_with_any_number_of_rows(dtype, shape):
    generator = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(*shape, generator=generator).to(dtype), torch.randn(shape[0], generator=generator).to(dtype)
    plain, eight = (cpu_kernels(dtype).pack(weight, bias, int8) for int8 in (False, True))
    assert cpu_kernels(dtype).pack(weight[:, :-1], None) is None, "an odd number of inputs"
    for rows in (0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 19, 20, 31, 300):
        x = torch.randn(rows, shape[1], generator=generator).to(dtype)
        expected = linear(x.double(), weight.double(), bias.double())
        scale = shape[1] ** 0.5
        assert ((plain(x).double() - expected).abs() < TOLERANCE[dtype] * scale).all()
        # each weight is off by up to half a step of 1 / 127 of its row's largest
        error = linear(x.double().abs(), weight.double().abs().amax(1, keepdim=True).expand(*shape) / 254)
        assert ((eight(x).double() - expected).abs() <= error + TOLERANCE[dtype] * scale).all()
    x = torch.ones(3, shape[1], dtype=dtype)
    for bad in (torch.nan, torch.inf, -torch.inf):
        x[1, -1] = bad
        for packed in (plain, eight):
            assert torch.isfinite(packed(x)).all(1).tolist() == [True, False, True]
            assert not torch.isfinite(packed(x)[1]).any()
    with pytest.raises(TypeError, match="its weights were"):
        plain(torch.zeros(1, shape[1], dtype=torch.float64))


@needs_compiler
def test_int8_takes_what_it_says(checkpoint):
    model = checkpoint("llama")
    outputs = {}
    for quantization in ("none", "int8"):
        llm = LLM(model.path, torch_dtype="float32", quantization=quantization)
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=5)
        (output,) = llm.generate([model.prompts[-1]], params, use_tqdm=False)
        outputs[quantization] = dict(output.logprobs[0].top)
    common = outputs["none"].keys() & outputs["int8"].keys()
    assert len(common) >= 3
    differences = [abs(outputs["none"][token] - outputs["int8"][token]) for token in common]
    assert 0 < max(differences) < 0.3
    for settings in ({"fuse": False}, {"torch_compile": True}):
        with pytest.raises(ConfigError, match="--quantization int8 needs"):
            LLM(model.path, quantization="int8", **settings)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_layers_are_one_call_where_they_are_of_the_common_kind(checkpoint, name, dtype):
    path = checkpoint(name).path
    executor = LLM(path, torch_dtype=dtype).core.executor
    assert (executor._whole is not None) == (name not in ("gemma2", "mixtral"))
    for settings in ({"fuse": False}, {"attention_backend": "sdpa"}, {"compare_sdpa_prefill": True}):
        assert LLM(path, torch_dtype=dtype, **settings).core.executor._whole is None
    if executor._whole is not None:
        ids = torch.zeros(5, dtype=torch.long)  # the trial's plan is still there, of 6 tokens
        with pytest.raises(ValueError, match="the planned step has 6 tokens"):
            executor._whole(ids, ids, ids)
        executor.model.get_input_embeddings().double()
        with pytest.raises(TypeError, match="their weights were"):
            executor._whole(ids, ids, ids)


@needs_compiler
@pytest.mark.parametrize("settings", [{"max_model_len": 4, "max_num_batched_tokens": 4}, {"max_sequence": 1}])
def test_small_as_it_may_be_it_starts(checkpoint, settings):
    assert LLM(checkpoint("llama").path, torch_dtype="float32", **settings).core.executor._whole is not None


@needs_compiler
def test_an_engine_that_is_given_up_takes_its_pages_along(checkpoint):
    """At once, and not when cycles are collected: the next one may need the room."""
    gc.collect()
    gc.disable()
    try:
        llm = LLM(checkpoint("llama").path, torch_dtype="float32")
        assert llm.core.executor._whole is not None
        backend = weakref.ref(llm.core.executor.backend)
        del llm
        assert backend() is None
    finally:
        gc.enable()


@needs_compiler
@pytest.mark.parametrize("change", ["residual", "no rope", "norm", "logits", "far away", "fails"])
def test_a_model_that_does_something_else_keeps_its_forward(monkeypatch, checkpoint, change):
    """Found out by trying: nothing in its names tells."""
    layer, norm, whole = LlamaDecoderLayer.forward, LlamaRMSNorm.forward, LlamaForCausalLM.forward

    def other_layer(self, hidden_states, *args, position_embeddings=None, position_ids=None, **options):
        cos, sin = position_embeddings
        if self.self_attn.layer_idx == 1 and change == "no rope":
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        if change == "far away":
            hidden_states = hidden_states * (1 + (position_ids > 100)[..., None])
        out = layer(self, hidden_states, *args, position_embeddings=(cos, sin), **options)
        return out + hidden_states if self.self_attn.layer_idx == 1 and change == "residual" else out

    @functools.wraps(whole)
    def other_whole(self, *args, **options):
        if change == "fails" and options["input_ids"].shape[1] == 6:
            raise KeyError("unusual")
        output = whole(self, *args, **options)
        if change == "logits":
            output.logits *= 2
        return output

    monkeypatch.setattr(LlamaDecoderLayer, "forward", other_layer)
    monkeypatch.setattr(LlamaForCausalLM, "forward", other_whole)
    if change == "norm":
        monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: norm(self, x) / 2)
    assert LLM(checkpoint("llama").path, torch_dtype="float32").core.executor._whole is None


def make(bias=True, sizes=(5, 3, 3)):
    torch.manual_seed(1)
    layers = [nn.Linear(8, size, bias=bias) for size in sizes]
    fused = FusedLinear(layers)
    return layers, [fused, *(FusedPart(fused, index) for index in range(1, len(sizes)))]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 1, 0, 2, 0), (2, 0)])
def test_parts_may_be_asked_for_in_any_order_and_for_any_input(bias, order):
    layers, parts = make(bias)
    first, second = torch.randn(2, 4, 8), torch.randn(1, 8)
    with torch.inference_mode():
        for x in (first, second, first):
            for index in order:
                torch.testing.assert_close(parts[index](x), layers[index](x))
        for index in order:  # inputs in turn
            for x in (first, second):
                torch.testing.assert_close(parts[index](x), layers[index](x))


def test_no_activation_is_kept_after_the_last_part():
    _, parts = make()
    x = torch.randn(2, 8)
    for part in parts:
        part(x)
    assert parts[0]._kept == [None, []]


def test_no_rows_at_all():
    layers, parts = make(sizes=(5,))
    assert parts[0](torch.empty(1, 0, 8)).shape == layers[0](torch.empty(1, 0, 8)).shape == (1, 0, 5)


def test_layers_that_do_not_belong_together_are_left_apart():
    class Special(nn.Linear):
        pass

    parent = nn.Module()
    parent.q_proj, parent.k_proj, parent.v_proj = nn.Linear(8, 4), Special(8, 4), nn.Linear(8, 4)
    parent.gate_proj, parent.up_proj = nn.Linear(8, 4, bias=False), nn.Linear(8, 4)
    kept = parent.k_proj
    fuse(parent, lambda weight, bias: None)
    assert parent.k_proj is kept
    assert parent.q_proj.sizes == parent.gate_proj.sizes == parent.up_proj.sizes == [4]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_it_can_be_switched_off(checkpoint, name):
    model = checkpoint(name)
    llm = LLM(model.path, torch_dtype="float32", fuse=False)
    assert any(type(module) is nn.Linear for module in llm.core.executor._model.modules())
    outputs = llm.generate(
        model.prompts, SamplingParams(temperature=0, max_tokens=OUTPUT_LENGTH, ignore_eos=True), use_tqdm=False
    )
    assert [output.token_ids for output in outputs] == model.expected


def test_rope_whose_halves_may_differ_is_not_given_to_a_kernel_that_reads_one(monkeypatch):
    fake_flashinfer.install(monkeypatch)

    class Unequal(nn.Module):
        def forward(self, x, position_ids):
            angles = position_ids[..., None] * torch.arange(64) / 10
            return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    class Unknown(Unequal):
        def forward(self, x, position_ids, layer_type):
            return super().forward(x, position_ids)

    for rotary, turned in ((None, True), (Unequal(), False), (Unknown(), False)):
        model = AutoModelForCausalLM.from_config(with_head_dim(64, "llama"), dtype=torch.bfloat16).eval()
        if rotary is not None:
            model.model.rotary_emb = rotary
        fuse_layers(model, torch.bfloat16, CudaKernels(), 64)
        assert ("forward" in vars(model.model.layers[0].self_attn)) == turned


def test_the_table_of_a_forward_pass_is_made_once_for_all_layers(monkeypatch):
    fake = fake_flashinfer.install(monkeypatch)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(with_head_dim(64, "qwen3"), dtype=torch.bfloat16).eval()
    fuse(model)
    fuse_layers(model, torch.bfloat16, CudaKernels(), 64)
    tables, apply = [], fake.apply_rope_with_cos_sin_cache
    monkeypatch.setattr(
        fake, "apply_rope_with_cos_sin_cache", lambda *args, **options: tables.append(args[4]) or apply(*args, **options)
    )
    ids = torch.randint(2, 512, (1, 7))
    with torch.inference_mode():
        first = model(ids, use_cache=False).logits
        second = model(ids, position_ids=torch.arange(20, 27)[None], use_cache=False).logits
    assert [table is tables[0] for table in tables] == [True, True, False, False]
    assert torch.equal(first, model(ids, use_cache=False).logits)
    assert first.shape == second.shape


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_heads_of_a_size_that_the_kernel_has_not_are_left_to_the_model(monkeypatch, device):
    if device == "cpu":
        fake_flashinfer.install(monkeypatch)
    for head_dim, turned in ((96, False), (128, True)):
        model = AutoModelForCausalLM.from_config(with_head_dim(head_dim, "llama"), dtype=torch.bfloat16).eval().to(device)
        fuse_layers(model, torch.bfloat16, CudaKernels(), 64)
        assert ("forward" in vars(model.model.layers[0].self_attn)) == turned


@needs_compiler
def test_rope_that_the_kernel_can_not_do_is_left_to_the_model():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES["llama"], dtype=torch.bfloat16).eval()
    plain = sys.modules[type(model).__module__].apply_rotary_pos_emb
    layer = fused_copy(model, torch.bfloat16).model.layers[0].self_attn
    rope = layer.forward.__func__.__globals__["apply_rotary_pos_emb"]
    assert rope is not plain
    q, k = torch.randn(1, 4, 3, 16).bfloat16(), torch.randn(1, 2, 3, 16).bfloat16()
    cos, sin = torch.randn(2, 1, 3, 16)  # float32
    gaps = torch.randn(1, 4, 16, 3).bfloat16().transpose(2, 3)
    narrow = cos.bfloat16(), sin.bfloat16()
    for arguments in ((q, k, cos, sin), (gaps, k, *narrow), (q, k, *narrow), (q, k, *narrow, 1)):
        for got, expected in zip(rope(*arguments), plain(*arguments), strict=True):
            torch.testing.assert_close(got, expected)
