"""End to end on a CUDA device: FlashInfer's kernels under real models, held to transformers in float32."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from simple_flashinfer import LLM, SamplingParams

pytestmark = pytest.mark.gpu

LENGTH = 40
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


def check(model, **settings):
    """Every token that was chosen is, in float32, the best one but for what 16 bit rounds away."""
    path, reference, prompts = model
    llm = LLM(path, device="cuda", torch_dtype="bfloat16", **{"max_model_len": 2048, **settings})
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    gaps = []
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output.token_ids) == LENGTH
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + output.token_ids], device="cuda")).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(output.token_ids, device="cuda")[:, None])[:, 0]
        gaps.append((logits.max(-1).values - chosen) / logits.std(-1))
    gap = torch.cat(gaps)
    assert (gap == 0).float().mean() > 0.8, "most tokens are the very best"
    assert gap.max() < 0.3
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
    check(model, max_model_len=768, kv_cache_memory=900 * bytes_per_token)
