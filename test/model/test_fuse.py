"""Fusing changes how fast a model computes, not what."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from simple_flashinfer import LLM, SamplingParams
from simple_flashinfer.model.fuse import FusedLinear, FusedPart, fuse
from test.conftest import ARCHITECTURES, OUTPUT_LENGTH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_the_same(name, dtype):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name], dtype=dtype).eval()
    fused = copy.deepcopy(model)
    fuse(fused)
    assert not [n for n, m in fused.named_modules() if type(m) is nn.Linear], "every projection is packed"
    ids = torch.randint(2, 512, (1, 37))
    with torch.inference_mode():
        expected, got = model(ids, use_cache=False).logits, fused(ids, use_cache=False).logits
    scale = expected.float().abs().max()
    assert (expected.float() - got.float()).abs().max() < scale * (1e-5 if dtype == torch.float32 else 2e-2)


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
    fuse(parent)
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
