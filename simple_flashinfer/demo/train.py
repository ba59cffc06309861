"""Trains a demo model that answers, from nothing but this package: the corpus is generated, the seed is fixed.

    python3 -m simple_flashinfer.demo.train OUT_FOLDER

One run with --minutes 80, on two cores of which other work took about one, saw 13.0 million of the 24 million tokens and
gave the weights that come along; their README.md tells how good they are. Beside other work set OMP_WAIT_POLICY=passive:
threads that wait actively for each other made it several times slower.

Prints the loss on held-out conversations and the scores of `evaluate`, and writes them into the folder's README.md. To serve
it: --model OUT_FOLDER.
"""

import argparse
import copy
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from simple_flashinfer.demo.corpus import Conversation, conversation, training_conversations
from simple_flashinfer.demo.skills import SKILLS
from simple_flashinfer.demo.tokenizer import segments, train_tokenizer

CONTEXT = 2048
_TOKENS = 24_000_000
_RATE = 4e-3
_EMBEDDING_NORM = 3.2  # ten times the usual: smaller ones change too fast for the heads that rest on them
_BATCH_TOKENS = 2048  # at first; twice as many at the end
_PROMPTS_UNTIL, _PROMPT_WEIGHT = 0.3, 0.05  # at first the loss on what the user writes counts a little: it teaches words
_POOL = 512  # conversations sorted by length together, so that batches need little padding
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
    tokenizer: Any, source: Iterator[Conversation], rng: random.Random, share: Callable[[], float] = lambda: 1.0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of ids and loss weights, [B, T] each; padding weighs 0, answers 1. share: how much of the training is done."""
    while True:
        encoded = [encode(tokenizer, made) for made in itertools.islice(source, _POOL)]
        if not encoded:
            return
        encoded = sorted((pair for pair in encoded if len(pair[0]) <= CONTEXT), key=lambda pair: len(pair[0]))
        most = int(_BATCH_TOKENS * (1 + share()))
        prompt_weight = _PROMPT_WEIGHT if share() < _PROMPTS_UNTIL else 0.0
        groups: list[list[tuple[list[int], list[bool]]]] = [[]]
        for pair in encoded:
            if groups[-1] and (len(groups[-1]) + 1) * len(pair[0]) > most:
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
def spell(model: Any, tokenizer: Any) -> None:
    """Sets the embeddings to sums of what all tokens share, how each is spelt, and something of its own.

    Spelling makes " apple" and "apple", which is how a list's first word is written, alike before any training, and it is
    what an alphabetical order rests on. What is shared is for `look_back`; it adds the same to all logits.
    """
    weight = model.model.embed_tokens.weight
    width = weight.shape[1]
    letters: dict[tuple[int, str], torch.Tensor] = {}
    spelt = torch.zeros_like(weight)
    for token, text in enumerate(tokenizer.convert_ids_to_tokens(range(len(weight)))):
        word = text.removeprefix("Ġ")  # a space
        marks = [(-1, "space")] * (word != text) + [(-1, "capital")] * (word != word.lower())
        for place, letter in [*enumerate(word.lower()[:6]), *marks]:
            spelt[token] += 0.7 ** abs(place) * letters.setdefault((place, letter), torch.randn(width))
    normalize = torch.nn.functional.normalize
    shared, own = normalize(torch.randn(1, width)), normalize(torch.randn_like(weight))
    weight.copy_(_EMBEDDING_NORM * normalize(shared + normalize(spelt) + own))
    model.model.norm.weight.fill_(0.32 / _EMBEDDING_NORM)  # the same logits as ever


@torch.no_grad()
def look_back(model: Any, sharpness: float = 10.0) -> None:
    """Sets the first two heads of the first layer to attend one and two tokens back; everything else stays.

    Copying needs a head that tells which token came just before (Olsson et al. 2022), and training is slow to make one.

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


@torch.no_grad()
def copy_on(model: Any, sharpness: float = 3.0) -> None:
    """Sets heads to continue what was there before: where the present token came earlier, they give what came after it.

    Such an induction head needs the first head of `look_back`, whose values and output are set here to write down, in
    directions of their own, a part of the token before. Two heads of the second layer compare it with the present token and
    copy what they find. Of the rotary frequencies they use the slow ones: distance means nothing. Other outputs start small.
    """
    config, (first, second) = model.config, [layer.self_attn for layer in model.model.layers[:2]]
    size, per_key = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    embeddings = model.model.embed_tokens.weight
    shared = embeddings.mean(dim=0, keepdim=True)
    basis = torch.linalg.qr(torch.cat([shared, torch.randn(config.hidden_size - 1, config.hidden_size)]).T).Q.T[1:]
    token, before, other = basis[: 3 * size].split(size)
    slow = (torch.arange(size) % (size // 2) >= size // 5)[:, None]
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= 0.3
        layer.mlp.down_proj.weight *= 0.3

    # what is read has a norm of sqrt(hidden_size) in all, what is written should compare with an embedding
    unit = embeddings.norm(dim=1).mean() / math.sqrt(config.hidden_size)
    first.v_proj.weight[:size] = (2.5 * unit).sqrt() * token
    first.o_proj.weight[:, :size] = (2.5 * unit).sqrt() * before.T
    first.o_proj.weight[:, size : per_key * size] = 0.0
    second.o_proj.weight.zero_()
    for group, copied in enumerate((token, other)):  # heads that share keys and values
        keys = slice(group * size, (group + 1) * size)
        queries = slice(group * per_key * size, (group * per_key + 1) * size)
        second.k_proj.weight[keys] = math.sqrt(sharpness) * slow * before
        second.q_proj.weight[queries] = math.sqrt(sharpness) * slow * token
        second.v_proj.weight[keys] = (10 * unit).sqrt() * copied
        second.o_proj.weight[:, queries] = (10 * unit).sqrt() * copied.T


def make_optimizers(model: Any, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers (Jordan 2024, steps scaled to AdamW's size), AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(
    model: Any,
    tokenizer: Any,
    device: str,
    tokens: int = _TOKENS,
    minutes: float = math.inf,
    save: Callable[[], None] = lambda: None,
    seed: int = 1,
) -> None:
    """A warm-up and a cosine over the given number of tokens, padding included, or minutes if these are over first.

    Calls `save` every tenth.
    """
    optimizers = make_optimizers(model, _RATE)
    done, smooth, saved, start = 0, 0.0, 0, time.monotonic()

    def share() -> float:
        return max(done / tokens, (time.monotonic() - start) / 60 / minutes)

    source = batches(tokenizer, training_conversations(seed, share), random.Random(2), share)
    with tqdm(total=tokens, unit="token", unit_scale=True, smoothing=0.05) as bar:
        while (now := share()) < 1:
            ids, weights = next(source)
            rate = _RATE * min(1.0, (now + 0.001) / 0.02) * (0.5 + 0.5 * math.cos(math.pi * now))
            for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
                group["lr"] = rate
            loss = loss_of(model, ids.to(device), weights.to(device))
            model.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            done += ids.numel()
            if int(10 * now) > saved:
                saved = int(10 * now)
                save()
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
    parser.add_argument("--minutes", type=float, default=math.inf, help="train no longer, on fewer tokens if need be")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    model = make_model(tokenizer)
    spell(model, tokenizer)
    look_back(model)
    copy_on(model)
    model.to(device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, vocabulary {len(tokenizer)}, on {device}")

    def save() -> None:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(options.folder)
        tokenizer.save_pretrained(options.folder)

    train(model, tokenizer, device, minutes=options.minutes, save=save)
    print(f"held-out loss on answers: {held_out_loss(model, tokenizer, device):.4f}")
    save()
    from simple_flashinfer.demo.evaluate import evaluate, write_card

    scores = evaluate(str(options.folder))
    print(scores)
    write_card(options.folder, scores)


if __name__ == "__main__":
    main()
