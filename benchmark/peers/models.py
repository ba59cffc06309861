"""Models of known shapes with random weights, and a tokenizer trained on the spot: nothing is downloaded.

    python3 -m benchmark.peers.models smollm2-135m FOLDER

What they say is noise, so they are good for speed only. Each token of the vocabulary has a text of its own, or servers that
send no event for an empty text would seem to skip tokens.
"""

import argparse
import random
import string
import sysconfig
from pathlib import Path
from typing import Any

END, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_TRAINED = 8192  # entries of the tokenizer that are learned; the rest of a vocabulary is filled up
_NUM_FILES = 150
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama", "vocab_size": 8192, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
    },
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
    },
}  # fmt: skip
SHAPES = tuple(_ARCHITECTURES)


def build(shape: str, folder: Path) -> Path:
    """Write the checkpoint (bfloat16) and tokenizer of `shape`, one of SHAPES, into `folder`, unless they are there."""
    done = folder / "built"
    if done.exists():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    architecture = dict(_ARCHITECTURES[shape])
    tokenizer = _tokenizer(architecture["vocab_size"])
    config = AutoConfig.for_model(
        architecture.pop("model_type"),
        **architecture,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    done.touch()
    return folder


def _tokenizer(vocabulary: int) -> Any:
    """A byte-level BPE with exactly `vocabulary` entries: learned ones, then made-up words that no text is cut into."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(_TRAINED, vocabulary),
        special_tokens=[END, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:_NUM_FILES]
    tokenizer.train([str(file) for file in files], trainer)
    ids = tokenizer.get_vocab()
    words = random.Random(0)
    while len(ids) < vocabulary:
        word = "Ġ" + "".join(words.choices(string.ascii_lowercase, k=7))  # Ġ is how byte-level BPE writes a space
        ids.setdefault(word, len(ids))
    merges = [tuple(pair) for pair in _merges(tokenizer)]
    tokenizer.model = models.BPE(vocab=ids, merges=merges)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END_OF_TURN, pad_token=END, chat_template=_CHAT_TEMPLATE
    )


def _merges(tokenizer: Any) -> list[list[str]]:
    import json

    merges: list[list[str]] = json.loads(tokenizer.to_str())["model"]["merges"]
    return merges


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    print(build(options.shape, options.folder))


if __name__ == "__main__":
    main()
