"""Trains a demo model that answers, from nothing but this package: the corpus is generated, the seed is fixed.

    python3 -m simple_flashinfer.demo.train OUT_FOLDER

Took 80 + 24 minutes, its first two stages, on two cores with other work beside it, and about 50 minutes, the last, on one.
Prints the loss on held-out conversations and the scores of `evaluate`, and writes them into the folder's README.md. To serve
it: --model OUT_FOLDER.
"""

import argparse
import copy
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from simple_flashinfer.demo.corpus import EARLY, EXACT, LATE, Conversation, Mix, conversation, training_conversations
from simple_flashinfer.demo.skills import SKILLS
from simple_flashinfer.demo.tokenizer import segments, train_tokenizer

CONTEXT = 2048
_BATCH_TOKENS = 4096
_POOL = 1024  # conversations sorted by length together, so that batches need little padding
_SHORT = 256


def encode(tokenizer: Any, made: Conversation) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them the assistant writes."""
    ids: list[int] = []
    answer: list[bool] = []
    for text, is_answer in segments(made.messages, made.tools):
        tokens = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        ids += tokens
        answer += [is_answer] * len(tokens)
    return ids, answer


def batches(
    tokenizer: Any, source: Iterator[Conversation], rng: random.Random, prompt_weight: float = 0.0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of ids and loss weights, [B, T] each, of about _BATCH_TOKENS tokens with padding, which weighs 0, answers 1."""
    while True:
        encoded = [encode(tokenizer, made) for made in itertools.islice(source, _POOL)]
        if not encoded:
            return
        encoded = sorted((pair for pair in encoded if len(pair[0]) <= CONTEXT), key=lambda pair: len(pair[0]))
        groups: list[list[tuple[list[int], list[bool]]]] = [[]]
        for pair in encoded:
            if groups[-1] and (len(groups[-1]) + 1) * len(pair[0]) > _BATCH_TOKENS:
                groups.append([])
            groups[-1].append(pair)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            ids = torch.zeros(len(group), width, dtype=torch.long)
            weights = torch.zeros(len(group), width)
            for row, (tokens, answer) in enumerate(group):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                weights[row, : len(tokens)] = torch.tensor([1.0 if own else prompt_weight for own in answer])
            yield ids, weights


def loss_of(model: Any, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    # on the CPU torch's fused attention pays for long rows only
    model.set_attn_implementation("eager" if ids.shape[1] <= _SHORT and ids.device.type == "cpu" else "sdpa")
    counted = weights[:, 1:] > 0
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        logits = model.lm_head(model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[counted])
    losses = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][counted], reduction="none")
    weight = weights[:, 1:][counted]
    return (losses * weight).sum() / weight.sum()


def make_model(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@torch.no_grad()
def look_back(model: Any, sharpness: float = 10.0) -> None:
    """Sets the first two heads of the first layer to attend one and two tokens back; everything else stays.

    Copying needs a head that tells which token came just before (Olsson et al. 2022). The first two stages made none that is
    sharp: attention was spread over the last few tokens, and one word in ten was taken from beside its place.

    The direction in which all tokens' inputs agree gives queries and keys that are the same at each position, so that rotary
    embedding alone decides: frequency f adds sharpness * f * cos(f * (distance - back)) to a score.
    """
    config, first = model.config, model.model.layers[0]
    size = config.head_dim
    inputs = first.input_layernorm(model.model.embed_tokens.weight)  # [vocabulary, hidden]
    shared = torch.linalg.lstsq(inputs, torch.ones_like(inputs[:, :1])).solution.flatten()
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2, device=inputs.device) / size)
    radius = (sharpness * frequencies * math.sqrt(size)).sqrt()  # the square root of the size: scores are divided by it
    first.self_attn.k_proj.weight[:size] = torch.outer(torch.cat([radius, torch.zeros_like(radius)]), shared)
    for head, back in enumerate((1, 2)):  # which share the first K/V head
        angle = back * frequencies
        query = torch.cat([radius * angle.cos(), -radius * angle.sin()])
        first.self_attn.q_proj.weight[head * size : (head + 1) * size] = torch.outer(query, shared)


def make_optimizers(model: Any, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers (Jordan 2024, steps scaled to AdamW's size), AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@dataclass(frozen=True, slots=True)
class Stage:
    """rate: the peak of the learning rate. prompt_weight: of the loss on what the user writes, where answers weigh 1."""

    tokens: int
    rate: float
    mix: Mix
    prompt_weight: float = 0.0


STAGES = (
    Stage(16_000_000, 4e-3, EARLY, prompt_weight=0.05),  # what the user writes teaches words and repetition
    Stage(5_000_000, 2e-3, LATE, prompt_weight=0.05),
    Stage(9_000_000, 1.5e-3, EXACT),
)


def train(
    model: Any, tokenizer: Any, stage: Stage, device: str, save: Callable[[], None] = lambda: None, seed: int = 1
) -> None:
    """A warm-up and a cosine over the given number of tokens, padding included. Calls `save` every tenth."""
    optimizers = make_optimizers(model, stage.rate)
    conversations = training_conversations(seed, stage.mix)
    source = batches(tokenizer, conversations, random.Random(2), stage.prompt_weight)
    tokens = stage.tokens
    done, smooth = 0, 0.0
    with tqdm(total=tokens, unit="token", unit_scale=True, smoothing=0.05) as bar:
        while done < tokens:
            ids, weights = next(source)
            share = done / tokens
            rate = stage.rate * min(1.0, (done + ids.numel()) / (0.03 * tokens)) * (0.5 + 0.5 * math.cos(math.pi * share))
            for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
                group["lr"] = rate
            loss = loss_of(model, ids.to(device), weights.to(device))
            model.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            if (done + ids.numel()) * 10 // tokens > done * 10 // tokens:
                save()
            done += ids.numel()
            smooth = loss.item() if not smooth else 0.98 * smooth + 0.02 * loss.item()
            bar.set_postfix(loss=f"{smooth:.3f}", rate=f"{rate:.1e}")
            bar.update(ids.numel())


@torch.inference_mode()
def held_out_loss(model: Any, tokenizer: Any, device: str) -> float:
    """Loss on answers of conversations whose last question is held out."""
    rng = random.Random(3)
    made = [conversation(rng, skill, held_out=True, filler_tokens=50) for skill in [*SKILLS, "memory"] for _ in range(20)]
    losses = []
    for ids, weights in itertools.islice(batches(tokenizer, iter(made), rng), 8):
        losses.append(loss_of(model, ids.to(device), (weights == 1).float().to(device)).item())
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--last",
        type=Path,
        metavar="FOLDER",
        help="only the last stage, from the weights and with the tokenizer in this folder",
    )
    options = parser.parse_args()
    from transformers import AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.last) if options.last else train_tokenizer()
    model = make_model(tokenizer).to(device)
    if options.last:
        model.load_state_dict(type(model).from_pretrained(options.last).state_dict())
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, vocabulary {len(tokenizer)}, on {device}")

    def save() -> None:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(options.folder)
        tokenizer.save_pretrained(options.folder)

    for number, stage in enumerate(STAGES, start=1):
        if number == len(STAGES):
            look_back(model)
        if number == len(STAGES) or not options.last:
            train(model, tokenizer, stage, device, save, seed=number)
    print(f"held-out loss on answers: {held_out_loss(model, tokenizer, device):.4f}")
    save()
    from simple_flashinfer.demo.evaluate import evaluate, write_card

    scores = evaluate(str(options.folder))
    print(scores)
    write_card(options.folder, scores)


if __name__ == "__main__":
    main()
