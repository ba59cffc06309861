"""What is asked: prompts of an exact length, recorded conversations, and the times at which requests arrive.

Lengths are the server's own count, template included. No tokenizer is needed: a few requests find out which of a list of
common words cost this server one token each, and a prompt is as many of them as it takes. This works for each server and
endpoint, and what each request's usage says is checked against it later.
"""

import itertools
import json
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmark.target import TargetError

Count = Callable[[str], Awaitable[int]]

_WORDS = (  # noqa: SIM905 (a list of words is read best as words)
    "the of and to in is for on with as at by from or an be this that it not are was but all have new more one if they "
    "which can will time has who no out so up we my about other into only some first two over could like your see get use "
    "make do than any just now how where when there also after back way our work day man most us his her he she you would "
    "these what them people me well year then set name list value return end file self none true false type class in string "
    "key"
).split()
_FEWEST_WORDS = 16
_DISTINCT = 3  # words in which any two prompts of a run differ: 16^3 prompts at the least
_SHAREGPT_LONGEST = 1024


@dataclass(frozen=True)
class Workload:
    """Lengths are in tokens. None: what the kind of workload says.

    start_token: text with which each prompt begins, repeated start_token_length times; without prompt_length it is all of
    the prompt. shared_prefix: the share of each prompt, from its start on, that all have in common. turns: requests of a
    conversation; each sends the earlier ones and their answers along, and adds as many words as the first one had.
    """

    prompt_length: int | None = None
    output_length: int | None = None
    start_token: str = ""
    start_token_length: int = 1
    shared_prefix: float = 0.0
    sharegpt: str | None = None
    turns: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Turn:
    text: str
    output_length: int
    prompt_tokens: int | None = None  # of the whole prompt, if that is known exactly
    repeated: bool = False  # the workload had no more to give, and began again


Conversation = tuple[Turn, ...]


@dataclass(frozen=True)
class Vocabulary:
    """words: cost one token each, behind `opening`, which costs `overhead` together with the chat template."""

    opening: str
    overhead: int
    words: tuple[str, ...]


async def calibrate(count: Count, opening: str = "the") -> Vocabulary:
    """Finds words of one token by asking `count`. Raises TargetError where there are too few."""
    eight, sixteen = [await count(opening + " the" * n) for n in (8, 16)]
    if sixteen - eight != 8:
        raise TargetError(f"eight times ' the' are {sixteen - eight} tokens for this server: can't make exact prompts")
    overhead = eight - 8

    async def of_one_token(words: list[str]) -> list[str]:
        if await count(" ".join([opening, *words])) == overhead + len(words):
            return words
        if len(words) == 1:
            return []
        half = len(words) // 2
        return await of_one_token(words[:half]) + await of_one_token(words[half:])

    words = await of_one_token(list(dict.fromkeys(_WORDS)))
    if len(words) < _FEWEST_WORDS:
        raise TargetError(f"only {len(words)} common words are one token for this server: can't make exact prompts")
    return Vocabulary(opening, overhead, tuple(words))


async def conversations(workload: Workload, count: Count) -> Iterator[Conversation]:
    """Without end, and the same for the same seed. `count` says how many tokens a prompt has. Raises TargetError."""
    if workload.sharegpt is not None:
        return await _recorded(workload, count)
    opening = workload.start_token * workload.start_token_length
    if opening and workload.prompt_length is None:
        return _same(opening, await count(opening), workload)
    vocabulary = await calibrate(count, opening or "the")
    length = workload.prompt_length or 256
    if length < vocabulary.overhead:
        what = "template and opening word" if not opening else "template and --start_token"
        raise TargetError(f"--prompt_length {length}: {what} alone are {vocabulary.overhead} tokens for this server")
    return _drawn(vocabulary, length, workload)


def _same(text: str, prompt_tokens: int, workload: Workload) -> Iterator[Conversation]:
    output = workload.output_length or 128
    later = [Turn(text, output)] * (workload.turns - 1)
    return itertools.repeat((Turn(text, output, prompt_tokens), *later))


def _drawn(vocabulary: Vocabulary, length: int, workload: Workload) -> Iterator[Conversation]:
    output = workload.output_length or 128
    num_words = length - vocabulary.overhead
    num_shared = min(num_words, max(0, round(workload.shared_prefix * length) - vocabulary.overhead))
    generator = random.Random(workload.seed)
    words = generator.sample(vocabulary.words, len(vocabulary.words))
    shared = generator.choices(words, k=num_shared)
    for turn in itertools.count(0, workload.turns):
        texts = []
        for number in range(turn, turn + workload.turns):
            digits = [words[number // len(words) ** place % len(words)] for place in range(_DISTINCT)]
            own = digits + generator.choices(words, k=max(0, num_words - num_shared - _DISTINCT))
            prefix = shared if number == turn else generator.choices(words, k=num_shared)
            texts.append(" ".join([vocabulary.opening, *prefix, *own[: num_words - num_shared]]))
        yield (Turn(texts[0], output, length), *(Turn(text, output) for text in texts[1:]))


async def _recorded(workload: Workload, count: Count) -> Iterator[Conversation]:
    """ShareGPT's format: a list of {"conversations": [{"from": "human" or "gpt", "value": TEXT}, ...]}.

    Answers are asked to be as long as the recorded ones, at the characters per token that the server finds in the file;
    prompt_length, by the same measure, is the longest message that is taken.
    """
    try:
        data = json.loads(Path(str(workload.sharegpt)).read_text(encoding="utf-8"))  # noqa: ASYNC240 (nothing else runs yet)
        pairs = [_pairs(item["conversations"])[: workload.turns] for item in data]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(f"--sharegpt {workload.sharegpt}: not a file in ShareGPT's format ({error!r})") from error
    pairs = [conversation for conversation in pairs if len(conversation) == workload.turns]
    random.Random(workload.seed).shuffle(pairs)
    sample = "\n".join(answer for conversation in pairs for _, answer in conversation)[:2000]
    if not sample:
        raise TargetError(f"--sharegpt {workload.sharegpt}: no conversation of {workload.turns} turns")
    characters = len(sample) / max(1, await count(2 * sample) - await count(sample))
    longest = characters * (workload.prompt_length or _SHAREGPT_LONGEST)
    kept = [
        tuple(Turn(asked, workload.output_length or max(1, round(len(answer) / characters))) for asked, answer in pair)
        for pair in pairs
        if all(len(asked) <= longest and len(answer) <= longest for asked, answer in pair)
    ]
    if not kept:
        raise TargetError(f"--sharegpt {workload.sharegpt}: no messages of at most {longest:.0f} characters")
    again = [tuple(Turn(turn.text, turn.output_length, repeated=True) for turn in conversation) for conversation in kept]
    return itertools.chain(kept, itertools.cycle(again))


def _pairs(messages: list[dict[str, str]]) -> list[tuple[str, str]]:
    """(question, answer) of each turn from the first question on, up to where they no longer alternate."""
    while messages and messages[0]["from"] not in {"human", "user"}:
        messages = messages[1:]
    pairs = []
    for asked, answer in zip(messages[::2], messages[1::2], strict=False):
        if asked["from"] not in {"human", "user"} or answer["from"] not in {"gpt", "chatgpt", "assistant"}:
            break
        if not asked["value"].strip() or not answer["value"].strip():
            break
        pairs.append((asked["value"], answer["value"]))
    return pairs


def arrival_times(rps: float, kind: str, burstiness: float, seed: int) -> Iterator[float]:
    """Seconds after the start, without end; gaps have a mean of 1 / rps.

    poisson: independent arrivals, exponential gaps. gamma: gaps of shape `burstiness`; below 1 they come in bursts, 1 is
    poisson, and the larger the more regular they are.
    """
    shape = burstiness if kind == "gamma" else 1.0
    generator = np.random.default_rng(seed)
    when = 0.0
    while True:
        yield when
        when += generator.gamma(shape, 1 / (rps * shape))
