"""Real checkpoints, built on the spot with random weights, and what transformers itself generates from them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from test.daemon import Daemon
from test.random_model import build_random_model

_COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # wide enough that the largest logit stands out from float32's rounding
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "llama": LlamaConfig(**_COMMON),
    "qwen2": Qwen2Config(**_COMMON),
    "qwen3": Qwen3Config(**_COMMON),
    "mistral": MistralConfig(**_COMMON, sliding_window=24),
    "gemma2": Gemma2Config(**_COMMON, sliding_window=24, query_pre_attn_scalar=16, attn_logit_softcapping=5.0),
    "mixtral": MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
}
PROMPT_LENGTHS = (1, 15, 16, 17, 31, 32, 33, 100)
OUTPUT_LENGTH = 24


@dataclass(frozen=True)
class Checkpoint:
    """A model folder, prompts, and for each prompt the greedy tokens of transformers' own `generate` in float32."""

    path: str
    prompts: list[list[int]] = field(default_factory=list)
    expected: list[list[int]] = field(default_factory=list)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with random weights that has a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("models") / "random"
    build_random_model(folder)
    return str(folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, random_model: str) -> Callable[[str], Checkpoint]:
    built: dict[str, Checkpoint] = {}

    def build(name: str) -> Checkpoint:
        if name not in built:
            built[name] = _build(name, tmp_path_factory.mktemp("models") / name, random_model)
        return built[name]

    return build


def _build(name: str, folder: Path, random_model: str) -> Checkpoint:
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name], dtype=torch.float32, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).write_bytes((Path(random_model) / file).read_bytes())
    prompts = [torch.randint(2, 512, (length,)).tolist() for length in PROMPT_LENGTHS]
    expected = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=OUTPUT_LENGTH, eos_token_id=None)
        expected.append(out[0, len(prompt) :].tolist())
    return Checkpoint(str(folder), prompts, expected)


@pytest.fixture(scope="session")
def daemon(random_model: str) -> Iterator[Daemon]:
    """The real daemon on a real port, shared by tests that only talk to it."""
    with Daemon("--model", random_model, "--served_model_name", "demo", "--torch_dtype", "float32") as running:
        yield running
