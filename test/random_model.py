"""A small Llama with random weights, and a tokenizer trained on words made up of syllables: real in all but sense."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_VOCABULARY = 2048
_SYLLABLES = [
    "ar", "ber", "co", "dan", "el", "fi", "go", "hu", "in", "ja", "ken", "lo", "mi", "nor", "os", "pa", "qui", "ra", "se",
    "tan", "ul", "vo", "wi", "yel", "zu", "the", "ing",
]  # fmt: skip
_PHRASES = """def main(self): return None
class Request: import os
if __name__ == "__main__": print("Hello, world!", 1, 23, 456)
{"name": "get_weather", "arguments": {"city": "Rome", "days": 3}}
What is the weather? I don't know. Tell me, please: one, two, three.
The day and the year of our work are in the list, but as all men know, it is not for us to say who will be first.
If you have time, make a new name for the file and see what they do with it now, for this is how some people get to that end.
"""
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}"""


def build_random_model(folder: Path) -> None:
    tokenizer = _train_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE,
    )


def _lines() -> Iterator[str]:
    """Always the same, whatever becomes of the project: so is what the model says."""
    yield from _PHRASES.splitlines() * 20
    draw = random.Random(0)
    words = ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 3))) for _ in range(1500)]
    for _ in range(3000):
        yield " ".join(draw.choices(words, k=8)).capitalize() + "."
