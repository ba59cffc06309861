"""Conversations for the demo model: exchanges of `skills` in a row, and memories told at one point and asked for at another.

What is held out is a conversation's end: its content, by the hash of its key, appears nowhere in training.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from simple_flashinfer.demo.skills import DRILLS, SKILLS, Exchange, Message, ask, is_held_out, phrase, tool_exchanges
from simple_flashinfer.demo.words import (
    ADJECTIVES,
    ANIMALS,
    COLOURS,
    FOODS,
    JOBS,
    NOUNS,
    THINGS,
    VERBS_PAST,
    a_city,
    a_name,
    any_word,
    made_up,
)


@dataclass(slots=True)
class Conversation:
    skill: str  # what its last answer shows
    messages: list[Message]
    tools: list[dict[str, Any]]
    held_out: bool


_MEMORIES: list[tuple[list[str], list[str], str, Callable[[random.Random], str]]] = [
    # what the user tells, how they ask for it later, the answer, the value
    (["My name is {}.", "I am {}.", "Call me {}.", "Hi, I am {}."], ["What is my name?", "Who am I?", "Do you know my name?"],
     "Your name is {}.", a_name),
    (["I live in {}.", "My home is in {}.", "I come from {}."], ["Where do I live?", "Which city do I live in?", "Where is my home?"],
     "You live in {}.", a_city),
    (["My dog is called {}.", "I have a dog named {}.", "The name of my dog is {}."], ["What is my dog called?", "Who is my dog?",
     "What is the name of my dog?"], "Your dog is called {}.", a_name),
    (["I work as a {}.", "I am a {} by profession.", "My job is {}."], ["What is my job?", "What do I work as?"],
     "You are a {}.", lambda rng: rng.choice(JOBS)),
    (["The code is {}.", "Remember the code {}.", "My code is {}."], ["What is the code?", "Tell me the code.", "Which code was it?"],
     "The code is {}.", lambda rng: str(rng.randint(1000, 9999))),
    (["My favorite food is {}.", "I love {}.", "I like to eat {}."], ["What is my favorite food?", "What do I like to eat?"],
     "You like {}.", lambda rng: rng.choice(FOODS)),
    (["My favorite color is {}.", "The color I like is {}."], ["What is my favorite color?", "Which color do I like?"],
     "Your favorite color is {}.", lambda rng: rng.choice(COLOURS)),
    (["The secret word is {}.", "Remember the word {}.", "Keep in mind: {}."], ["What is the secret word?", "Which word was it?",
     "What was the word?"], "The word is {}.", lambda rng: made_up(rng) if rng.random() < 0.3 else rng.choice(NOUNS)),
]  # fmt: skip
_CHARACTERS_A_TOKEN = 5.5
_ACKNOWLEDGED = "I will remember that."


def _story(rng: random.Random, sentences: int) -> str:
    parts = []
    for _ in range(sentences):
        parts.append(
            rng.choice([
                f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} {rng.choice(VERBS_PAST)} a {rng.choice(NOUNS)}.",
                f"A {rng.choice(JOBS)} {rng.choice(VERBS_PAST)} the {rng.choice(COLOURS)} {rng.choice(THINGS)}.",
                f"Near the {rng.choice(THINGS)} was a {rng.choice(ADJECTIVES)} {rng.choice(ANIMALS)}.",
                f"They {rng.choice(VERBS_PAST)} the {rng.choice(THINGS)} and {rng.choice(VERBS_PAST)} the {rng.choice(FOODS)}.",
            ])
        )  # fmt: skip
    return " ".join(parts)


def story(rng: random.Random) -> Exchange:
    """Text that means nothing, to be read."""
    text = _story(rng, rng.randint(2, 12))
    return ask(rng.choice(["Read this: ", "Here is a text: ", "Listen: "]) + text, "I have read it.")


_SYSTEM_PROMPTS = [
    "You are a helpful assistant.", "Be brief.", "You are a friendly assistant. Answer in a few words.", "Answer the user.",
    "You are an assistant that comes with simple-flashinfer.", "Be polite, and do not invent things.",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mix:
    """What a part of the training is made of.

    often: weights of the skills. memory, tools, drills: shares of the conversations, which are of their own kind. varied: how
    often tools and memories have names and values from outside their lists. recalls: how often something is asked for in the
    middle of a conversation, too.
    """

    often: dict[str, float]
    drills: float
    tools: float = 0.12
    memory: float = 0.23
    varied: float = 0.5
    recalls: float = 0.3


EARLY = Mix(
    {"small talk": 0.6, "unknown": 0.5, "server": 0.9, "arithmetic": 7.0, "repeat": 0.6, "reverse": 1.3, "sort": 2.4, "count": 0.8,
     "capitalise": 0.8, "extract": 1.2},
    drills=0.5,
)  # fmt: skip
EXACT = Mix(  # more of what takes long to get exact: lists, JSON, sums
    {"small talk": 0.4, "unknown": 0.4, "server": 0.9, "arithmetic": 10.0, "repeat": 2.5, "reverse": 3.0, "sort": 7.0, "count": 0.5,
     "capitalise": 3.0, "extract": 4.0},
    drills=0.25,
)  # fmt: skip
_FILLERS = ["small talk", "arithmetic", "repeat", "reverse", "sort", "capitalise", "server"]


def conversation(
    rng: random.Random,
    skill: str,
    held_out: bool,
    filler_tokens: int = 0,
    before: int | None = None,
    recalls: float = 0.15,
    varied: bool = False,
) -> Conversation:
    """One conversation that ends with this skill. Only its end is held out; what comes before may have been seen.

    before: exchanges that come before, by default mostly none and at most three.
    Skill `memory` tells something first, then other exchanges of about filler_tokens, then asks.
    varied: tools and memories have names and values from outside their lists; recalls: see `Mix`.
    """
    if skill == "memory":
        return _remember(rng, held_out, filler_tokens, recalls, varied)
    if before is None:
        before = rng.randint(1, 3) if rng.random() < 0.25 else 0
    if skill == "tools":
        return _use_tools(rng, held_out, min(before, 2), varied)
    while is_held_out(skill, (last := SKILLS[skill](rng)).key) != held_out:
        pass
    messages: list[Message] = []
    for other in rng.choices(list(EARLY.often), list(EARLY.often.values()), k=before):
        messages += _seen(rng, other).messages
    return Conversation(skill, messages + last.messages, [], held_out)


def _seen(rng: random.Random, skill: str) -> Exchange:
    while is_held_out(skill, (exchange := SKILLS[skill](rng)).key):
        pass
    return exchange


def _use_tools(rng: random.Random, held_out: bool, before: int, varied: bool) -> Conversation:
    while True:
        *first, last = tool_exchanges(rng, before + 1, varied)
        if is_held_out("tools", last.key) == held_out and not any(is_held_out("tools", e.key) for e in first):
            break
    messages: list[Message] = []
    for exchange in first:
        messages += exchange.messages
        if rng.random() < 0.3:  # tools are there, and not needed
            messages += _seen(rng, rng.choice(["small talk", "repeat"])).messages
    return Conversation("tools", messages + last.messages, last.tools, held_out)


def _remember(rng: random.Random, held_out: bool, filler_tokens: int, recalls: float, varied: bool) -> Conversation:
    while True:
        chosen = rng.sample(_MEMORIES, rng.randint(1, 4))
        values = [any_word(rng) if varied and rng.random() < 0.5 else make(rng) for *_, make in chosen]
        target = rng.randrange(len(chosen))
        keys = [f"{answer} {value}" for (_, _, answer, _), value in zip(chosen, values, strict=True)]
        if is_held_out("memory", keys[target]) == held_out and not any(
            is_held_out("memory", key) for i, key in enumerate(keys) if i != target
        ):
            break
    messages: list[Message] = []
    for (tells, *_), value in zip(chosen, values, strict=True):
        tell = rng.choice(tells).format(value)
        if rng.random() < 0.3:
            tell = rng.choice([tell + " " + _story(rng, 1), _story(rng, 1) + " " + tell])
        messages += [{"role": "user", "content": tell}, {"role": "assistant", "content": _ACKNOWLEDGED}]

    def recall(index: int) -> None:
        _, asks, answer, _ = chosen[index]
        question = phrase(rng, rng.choice(asks))
        messages.extend(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer.format(values[index])}]
        )

    size = 0
    others = [i for i in range(len(chosen)) if i != target]
    while size < filler_tokens * _CHARACTERS_A_TOKEN:
        exchange = story(rng) if rng.random() < 0.4 else _seen(rng, rng.choice(_FILLERS))
        messages += exchange.messages
        size += sum(len(message["content"]) + 40 for message in exchange.messages)  # with their marks
        if others and rng.random() < recalls:
            recall(rng.choice(others))
    for index in rng.sample(others, rng.randint(0, len(others))):
        recall(index)
    recall(target)
    return Conversation("memory", messages, [], held_out)


def training_conversations(seed: int, share: Callable[[], float] = lambda: 0.0) -> Iterator[Conversation]:
    """Without end, the same for the same seed. share: how much of the training is done, which shifts from EARLY to EXACT."""
    rng = random.Random(seed)
    while True:
        mix = EXACT if rng.random() < share() else EARLY
        made = _drill(rng) if rng.random() < mix.drills else _for_training(rng, mix)
        if rng.random() < 0.2:
            made.messages.insert(0, {"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)})
        yield made


def _drill(rng: random.Random) -> Conversation:
    skill = rng.choice(list(DRILLS))
    while is_held_out(skill, (lesson := DRILLS[skill](rng)).key):
        pass
    return Conversation(skill, lesson.messages, [], False)


def _for_training(rng: random.Random, mix: Mix) -> Conversation:
    roll, varied = rng.random(), rng.random() < mix.varied
    if roll < mix.tools:
        return conversation(rng, "tools", held_out=False, before=rng.randint(0, 2), varied=varied)
    if roll < mix.tools + mix.memory:
        length = rng.random()
        filler = 0 if length < 0.5 else rng.randint(10, 120) if length < 0.85 else rng.randint(120, 500)
        if length > 0.97:
            filler = rng.randint(500, 1400)
        return conversation(rng, "memory", held_out=False, filler_tokens=filler, recalls=mix.recalls, varied=varied)
    (skill,) = rng.choices(list(mix.often), list(mix.often.values()))
    return conversation(rng, skill, held_out=False, before=rng.choice([0, 0, 1, 2, 3, 5, 7]))
