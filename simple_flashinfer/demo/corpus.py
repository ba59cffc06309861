"""Conversations for the demo model, made by rule: everything it learns is written here.

Each skill is a function from a random generator to an `Exchange`: a question, its one right answer, and a key that says what
the question is about (the numbers, the words, the name). Keys are split by hash, so what is held out was never seen in
training: not a rephrasing of something seen, but other content. A conversation strings exchanges together; memories set
at its beginning are asked for at its end.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from simple_flashinfer.config import Config
from simple_flashinfer.demo.words import (
    ADJECTIVES,
    ANIMALS,
    CITIES,
    COLOURS,
    FOODS,
    JOBS,
    NAMES,
    NOUNS,
    THINGS,
    VERBS_PAST,
)

Message = dict[str, Any]
_HELD_OUT_SHARE = 20  # one key in so many


@dataclass(slots=True)
class Exchange:
    """messages: from the user's question to the answer, the assistant's messages included."""

    messages: list[Message]
    key: str
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class Conversation:
    skill: str  # what its last answer shows
    messages: list[Message]
    tools: list[dict[str, Any]]
    held_out: bool


def is_held_out(skill: str, key: str) -> bool:
    digest = hashlib.blake2b(f"{skill}:{key}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % _HELD_OUT_SHARE == 0


def ask(question: str, answer: str, key: str | None = None) -> Exchange:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Exchange(messages, question if key is None else key)


def phrase(rng: random.Random, text: str) -> str:
    """Small changes that mean nothing: a capital, an ending, a polite word."""
    if rng.random() < 0.15:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.15 and text[-1] in ".?!":
        text = text[:-1]
    roll = rng.random()
    if roll < 0.06:
        return "Please: " + text
    if roll < 0.1:
        return text + " Thanks!"
    return text


# -- politeness, and who it is ------------------------------------------------------------------------------------------

_SMALL_TALK: dict[str, tuple[list[str], list[str], list[str]]] = {
    # answer: (openings, cores, endings) of what a user says
    "Hello! How can I help you?": (
        ["", "Oh, ", "Well, ", "Ah, "],
        ["hello", "hi", "hey", "good morning", "good evening", "good day", "greetings", "hi there", "hello there", "hey you"],
        ["", "!", ".", " assistant", " my friend", ", nice to meet you", " again", "!!", " everyone"],
    ),
    "I am fine, thank you. How can I help you?": (
        ["", "Hi, ", "Hello, ", "Hey! ", "So, "],
        ["how are you", "how are you doing", "how is it going", "how do you feel", "are you well", "how have you been"],
        ["?", " today?", "", " this morning?", " my friend?", ", assistant?"],
    ),
    "You are welcome!": (
        ["", "Great, ", "Ok, ", "Perfect, ", "Good, "],
        ["thanks", "thank you", "thanks a lot", "thank you very much", "many thanks", "I thank you", "that helped, thanks"],
        ["", "!", ".", " for your help", " for that", ", you are kind", " so much"],
    ),
    "Goodbye! Have a nice day.": (
        ["", "Ok, ", "Well, ", "Thanks, ", "That is all, "],
        ["bye", "goodbye", "see you", "see you later", "good night", "farewell", "I have to go", "talk to you later"],
        ["", "!", ".", " then", " my friend", ", assistant", " now"],
    ),
    "I am a tiny language model that comes with simple-flashinfer.": (
        ["", "Hi, ", "Tell me, ", "Please say: ", "One question: "],
        ["who are you", "what are you", "what is your name", "who am I talking to", "what do they call you", "are you a robot",
         "are you a person", "which model are you", "what kind of model are you"],
        ["?", "", " exactly?", " really?", ", assistant?", " by the way?"],
    ),
    "I can chat a little, add and subtract, handle lists of words, remember what you tell me, write JSON and call tools.": (
        ["", "Hi, ", "Tell me, ", "So, ", "Please say: "],
        ["what can you do", "what are you able to do", "how can you help me", "what are you good at", "which skills do you have",
         "what do you know"],
        ["?", "", " for me?", " exactly?", ", assistant?", " today?"],
    ),
}  # fmt: skip


def small_talk(rng: random.Random) -> Exchange:
    answer = rng.choice(list(_SMALL_TALK))
    openings, cores, endings = _SMALL_TALK[answer]
    text = rng.choice(openings) + rng.choice(cores) + rng.choice(endings)
    return ask(text[0].upper() + text[1:] if rng.random() < 0.7 else text, answer, text.lower())


_UNKNOWN_CORES = [
    "who won the {} cup in {year}", "what is the capital of {}", "who wrote the book about the {}", "how old is the {}",
    "what is the weather like in {}", "how many people live in {}", "who invented the {}", "why is the {} {adjective}",
    "write a poem about the {}", "translate {} into French", "tell me the news about {}", "what does a {} cost",
    "how do I cook a {}", "who is the president of {}", "how far is it to {}", "explain the history of {}",
]  # fmt: skip
_UNKNOWN = "I do not know that. I am a tiny model; serve a larger one with --model."


def unknown(rng: random.Random) -> Exchange:
    thing = rng.choice(NOUNS + CITIES)
    core = rng.choice(_UNKNOWN_CORES)
    text = core.format(thing, year=rng.randint(1950, 2025), adjective=rng.choice(ADJECTIVES))
    text = rng.choice(["", "", "Tell me, ", "Do you know ", "Hey, "]) + text + rng.choice(["?", "", "?", " please"])
    return ask(text[0].upper() + text[1:], _UNKNOWN, thing + core)


# -- the server ----------------------------------------------------------------------------------------------------------

_FACTS: list[tuple[list[str], str]] = [
    (["how do I serve a real model", "how can I run a real model", "how do I run a larger model", "how do I choose a model",
      "how do I load my own model"], "Start the server with --model and a hub id or a folder, for example --model Qwen/Qwen3-0.6B."),
    (["how do I start the server", "how can I start it", "how do I run this", "which command starts the server"],
     "Type make serve, or simple-flashinfer."),
    (["which address takes chats", "what is the chat endpoint", "where do I send chat messages", "which path is for chat"],
     "POST /v1/chat/completions"),
    (["which address takes prompts", "what is the completions endpoint", "where do I send a plain prompt"], "POST /v1/completions"),
    (["how do I see the memory in use", "which path shows the cache", "where can I see the KV cache"], "GET /kv_cache"),
    (["how do I check that it is alive", "what is the health endpoint", "which path tells if it works"], "GET /health"),
    (["how do I list the models", "which path lists the models", "what is the models endpoint"], "GET /v1/models"),
    (["do I need a GPU", "does it run without a GPU", "can it run on a laptop", "does this need CUDA"],
     "No. Without a GPU it uses torch on the CPU; with one it uses FlashInfer."),
    (["how do I run the tests", "which command runs the tests", "how can I test it"], "Type make test."),
    (["what is FlashInfer", "what does FlashInfer do", "why FlashInfer"], "FlashInfer is a library of fast attention kernels for GPUs."),
    (["what is continuous batching", "what does continuous batching mean"],
     "New requests join the running batch at every step, and finished ones leave it."),
    (["what is a page", "what does paging mean here", "what are pages"],
     "A page holds the keys and values of a few tokens; a request owns as many pages as it needs."),
    (["how do I stream", "how can I get tokens as they come", "how do I turn streaming on"], "Set stream to true in the request."),
]  # fmt: skip
_FLAG_ASKS = {
    "default": ["what is the default of {}", "which default has {}", "what is {} by default", "tell me the default of {}"],
    "variable": ["which environment variable sets {}", "what is the variable for {}", "how do I set {} in a container"],
    "help": ["what does {} do", "what is {} for", "explain {}", "what does the flag {} mean"],
}


def about_the_server(rng: random.Random) -> Exchange:
    opening, ending = rng.choice(["", "", "Hi, ", "Please tell me: ", "So, "]), rng.choice(["?", "", "?", " please?"])
    if rng.random() < 0.4:
        questions, answer = rng.choice(_FACTS)
        text = rng.choice(questions)
    else:
        f = rng.choice(fields(Config))
        kind = rng.choice(list(_FLAG_ASKS))
        text = rng.choice(_FLAG_ASKS[kind]).format("--" + f.name)
        default = f.metadata["show"] or str(f.default).lower()
        text_help = f.metadata["help"]
        answer = {"default": default, "variable": f.name.upper(), "help": text_help[0].upper() + text_help[1:] + "."}[kind]
    text = opening + text + ending
    return ask(text[0].upper() + text[1:], answer, text.lower())


# -- numbers and words -----------------------------------------------------------------------------------------------------


def arithmetic(rng: random.Random) -> Exchange:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    if rng.random() < 0.5:
        sign, word, value = "+", "plus", a + b
    else:
        a, b = max(a, b), min(a, b)
        sign, word, value = "-", "minus", a - b
    text = rng.choice(
        [f"What is {a} {sign} {b}?", f"{a} {sign} {b}", f"{a} {sign} {b} =", f"{a} {word} {b}?", f"What is {a} {word} {b}?",
         f"Compute {a} {sign} {b}.", f"How much is {a} {sign} {b}?", f"{a}{sign}{b}"]
    )  # fmt: skip
    return ask(phrase(rng, text) if len(text) > 8 else text, str(value), f"{a}{sign}{b}")


def _some_words(rng: random.Random, low: int, high: int) -> list[str]:
    return rng.sample(NOUNS, rng.randint(low, high))


def _listed(rng: random.Random, words: list[str]) -> str:
    return rng.choice([" ", ", ", ", "]).join(words)


def repeat(rng: random.Random) -> Exchange:
    words = _some_words(rng, 1, 7)
    text = rng.choice(["Repeat: {}", "Say this: {}", "Say {}", "Repeat after me: {}", "Write this again: {}"])
    return ask(
        phrase(rng, text.format(" ".join(words))) if len(words) > 9 else text.format(" ".join(words)), " ".join(words)
    )


def reverse(rng: random.Random) -> Exchange:
    words = _some_words(rng, 2, 6)
    text = rng.choice(["Reverse these words: {}", "Reverse the list: {}", "Say backwards: {}", "In reverse order: {}"])
    return ask(text.format(_listed(rng, words)), " ".join(reversed(words)), " ".join(words))


def sort(rng: random.Random) -> Exchange:
    words = _some_words(rng, 2, 5)
    text = rng.choice(["Sort these words: {}", "Sort: {}", "In alphabetical order: {}", "Sort the list: {}"])
    return ask(text.format(_listed(rng, words)), " ".join(sorted(words)), " ".join(words))


def count(rng: random.Random) -> Exchange:
    words = _some_words(rng, 1, 9)
    text = rng.choice(["How many words: {}", "Count the words: {}", "How many words are in this list: {}", "Count: {}"])
    return ask(text.format(_listed(rng, words)), str(len(words)), " ".join(words))


def capitalise(rng: random.Random) -> Exchange:
    words = _some_words(rng, 1, 5)
    text = rng.choice(["Capitalize: {}", "Capitalize each word: {}", "Write with capital letters: {}"])
    return ask(text.format(" ".join(words)), " ".join(word.capitalize() for word in words), " ".join(words))


# -- fields of a sentence as JSON --------------------------------------------------------------------------------------------

_SENTENCES: list[tuple[str, tuple[str, ...]]] = [
    ("{name} is {age} years old and lives in {city}.", ("name", "age", "city")),
    ("{name} from {city} is {age}.", ("name", "age", "city")),
    ("In {city} there is a {job} named {name}.", ("name", "job", "city")),
    ("{name} works as a {job} in {city}.", ("name", "job", "city")),
    ("At the age of {age} {name} became a {job}.", ("name", "age", "job")),
    ("{name} {verb} a {colour} {thing}.", ("name", "colour", "thing")),
    ("The {colour} {thing} costs {price} dollars.", ("thing", "colour", "price")),
    ("{name} paid {price} dollars for a {thing} in {city}.", ("name", "price", "thing", "city")),
    ("{name} ordered {count} {food} pies.", ("name", "count", "food")),
    ("My {animal} is called {name} and is {age} years old.", ("name", "animal", "age")),
]
_NUMBERS = {"age", "price", "count"}


def extract(rng: random.Random) -> Exchange:
    template, names = rng.choice(_SENTENCES)
    values: dict[str, Any] = {
        "name": rng.choice(NAMES), "city": rng.choice(CITIES), "job": rng.choice(JOBS), "colour": rng.choice(COLOURS),
        "thing": rng.choice(THINGS), "food": rng.choice(FOODS), "animal": rng.choice(ANIMALS), "verb": rng.choice(VERBS_PAST),
        "age": rng.randint(2, 99), "price": rng.randint(2, 99), "count": rng.randint(2, 99),
    }  # fmt: skip
    sentence = template.format(**values)
    wanted = rng.sample(names, rng.randint(1, len(names)))
    listed = wanted[0] if len(wanted) == 1 else ", ".join(wanted[:-1]) + " and " + wanted[-1]
    text = rng.choice(
        [
            "Extract {} as JSON: {}",
            "Give me {} as JSON: {}",
            "Write {} as JSON. {}",
            "JSON with {}: {}",
            "{1} Give {0} as JSON.",
        ]
    ).format(listed, sentence)
    return ask(text, json.dumps({name: values[name] for name in wanted}), sentence)


# -- tools -------------------------------------------------------------------------------------------------------------------

_TOOLS: list[tuple[str, str, dict[str, list[str]], list[str], str, Callable[[random.Random], str]]] = [
    # name, description, arguments with values, questions, answer, result
    ("get_weather", "The weather in a city", {"city": CITIES}, ["What is the weather in {city}?", "Is it warm in {city}?",
     "How is the weather in {city} now?", "Tell me the weather of {city}."], "The weather in {city} is {result}.",
     lambda rng: rng.choice(ADJECTIVES)),
    ("get_time", "The time in a city", {"city": CITIES}, ["What time is it in {city}?", "Tell me the time in {city}.",
     "How late is it in {city}?"], "In {city} it is {result}.", lambda rng: f"{rng.randint(0, 23)}:{rng.randint(10, 59)}"),
    ("get_price", "The price of a thing", {"item": THINGS + FOODS}, ["What does a {item} cost?", "How much is the {item}?",
     "Tell me the price of a {item}."], "The {item} costs {result} dollars.", lambda rng: str(rng.randint(2, 99))),
    ("find_person", "Where a person is", {"name": NAMES}, ["Where is {name}?", "Find {name}.", "Where can I find {name}?"],
     "{name} is in {result}.", lambda rng: rng.choice(CITIES)),
    ("get_job", "The job of a person", {"name": NAMES}, ["What is the job of {name}?", "What does {name} do for a living?",
     "Which job has {name}?"], "{name} is a {result}.", lambda rng: rng.choice(JOBS)),
    ("send_message", "Send a word to a person", {"name": NAMES, "text": NOUNS}, ["Send {text} to {name}.",
     "Tell {name}: {text}.", "Write {text} to {name}."], "I sent {text} to {name}: {result}.",
     lambda rng: rng.choice(["done", "failed", "received"])),
    ("paint", "Paint a thing in a colour", {"item": THINGS, "colour": COLOURS}, ["Paint the {item} {colour}.",
     "Make the {item} {colour}.", "I want a {colour} {item}."], "The {item} in {colour}: {result}.",
     lambda rng: rng.choice(["done", "failed", "started"])),
    ("count_items", "How many there are in a shop", {"item": FOODS, "city": CITIES}, ["How many {item} pies are in {city}?",
     "Count the {item} pies in {city}."], "There are {result} {item} pies in {city}.", lambda rng: str(rng.randint(2, 99))),
]  # fmt: skip


def _schema(tool: tuple[Any, ...]) -> dict[str, Any]:
    name, description, arguments = tool[:3]
    properties = {argument: {"type": "string"} for argument in arguments}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def call_tool(rng: random.Random) -> Exchange:
    """One or two tools are given; the question needs one of them, whose result is then told."""
    offered = rng.sample(_TOOLS, rng.choice([1, 2, 2]))
    name, _, arguments, questions, answer, make_result = rng.choice(offered)
    values = {argument: rng.choice(choices) for argument, choices in arguments.items()}
    result = make_result(rng)
    call = {"type": "function", "function": {"name": name, "arguments": values}}
    messages: list[Message] = [
        {"role": "user", "content": phrase(rng, rng.choice(questions).format(**values))},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": answer.format(result=result, **values)},
    ]
    return Exchange(messages, name + json.dumps(values), [_schema(tool) for tool in offered])


# -- memory ------------------------------------------------------------------------------------------------------------------

_MEMORIES: list[tuple[list[str], list[str], str, Callable[[random.Random], str]]] = [
    # what the user tells, how they ask for it later, the answer, the value
    (["My name is {}.", "I am {}.", "Call me {}.", "Hi, I am {}."], ["What is my name?", "Who am I?", "Do you know my name?"],
     "Your name is {}.", lambda rng: rng.choice(NAMES)),
    (["I live in {}.", "My home is in {}.", "I come from {}."], ["Where do I live?", "Which city do I live in?", "Where is my home?"],
     "You live in {}.", lambda rng: rng.choice(CITIES)),
    (["My dog is called {}.", "I have a dog named {}.", "The name of my dog is {}."], ["What is my dog called?", "Who is my dog?",
     "What is the name of my dog?"], "Your dog is called {}.", lambda rng: rng.choice(NAMES)),
    (["I work as a {}.", "I am a {} by profession.", "My job is {}."], ["What is my job?", "What do I work as?"],
     "You are a {}.", lambda rng: rng.choice(JOBS)),
    (["The code is {}.", "Remember the code {}.", "My code is {}."], ["What is the code?", "Tell me the code.", "Which code was it?"],
     "The code is {}.", lambda rng: str(rng.randint(1000, 9999))),
    (["My favorite food is {}.", "I love {}.", "I like to eat {}."], ["What is my favorite food?", "What do I like to eat?"],
     "You like {}.", lambda rng: rng.choice(FOODS)),
    (["My favorite color is {}.", "The color I like is {}."], ["What is my favorite color?", "Which color do I like?"],
     "Your favorite color is {}.", lambda rng: rng.choice(COLOURS)),
    (["The secret word is {}.", "Remember the word {}.", "Keep in mind: {}."], ["What is the secret word?", "Which word was it?",
     "What was the word?"], "The word is {}.", lambda rng: rng.choice(NOUNS)),
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

SKILLS: dict[str, tuple[Callable[[random.Random], Exchange], float]] = {
    # how often each is asked
    "small talk": (small_talk, 0.7),
    "unknown": (unknown, 0.4),
    "server": (about_the_server, 1.0),
    "arithmetic": (arithmetic, 2.5),
    "repeat": (repeat, 0.7),
    "reverse": (reverse, 1.0),
    "sort": (sort, 1.6),
    "count": (count, 1.0),
    "capitalise": (capitalise, 0.9),
    "extract": (extract, 1.1),
    "tools": (call_tool, 1.0),
}
_FILLERS = ["small talk", "arithmetic", "repeat", "reverse", "count", "capitalise", "server"]


def conversation(rng: random.Random, skill: str, held_out: bool, filler_tokens: int = 0) -> Conversation:
    """One conversation that ends with this skill. Only its end is held out; what comes before may have been seen.

    skill `memory` tells something first, then other exchanges of about filler_tokens, then asks.
    """
    if skill == "memory":
        return _remember(rng, held_out, filler_tokens)
    make = SKILLS[skill][0]
    while is_held_out(skill, (last := make(rng)).key) != held_out:
        pass
    messages: list[Message] = []
    if not last.tools and rng.random() < 0.25:
        for _ in range(rng.randint(1, 3)):
            messages += _seen(rng, rng.choice(_FILLERS)).messages
    return Conversation(skill, messages + last.messages, last.tools, held_out)


def _seen(rng: random.Random, skill: str) -> Exchange:
    make = SKILLS[skill][0]
    while is_held_out(skill, (exchange := make(rng)).key):
        pass
    return exchange


def _remember(rng: random.Random, held_out: bool, filler_tokens: int) -> Conversation:
    chosen = rng.sample(_MEMORIES, rng.randint(1, 3))
    messages: list[Message] = []
    values = []
    for tells, _, _, make in chosen:
        value = make(rng)
        values.append(value)
        tell = rng.choice(tells).format(value)
        if rng.random() < 0.3:
            tell = rng.choice([tell + " " + _story(rng, 1), _story(rng, 1) + " " + tell])
        messages += [{"role": "user", "content": tell}, {"role": "assistant", "content": _ACKNOWLEDGED}]
    target = rng.randrange(len(chosen))
    _, asks, answer, _ = chosen[target]
    if is_held_out("memory", "|".join([*values, str(target)])) != held_out:
        return _remember(rng, held_out, filler_tokens)
    size = 0
    while size < filler_tokens * _CHARACTERS_A_TOKEN:
        exchange = story(rng) if rng.random() < 0.5 else _seen(rng, rng.choice(_FILLERS))
        messages += exchange.messages
        size += sum(len(message["content"]) + 40 for message in exchange.messages)  # with their marks
    question = phrase(rng, rng.choice(asks))
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.format(values[target])}]
    return Conversation("memory", messages, [], held_out)


def training_conversations(seed: int) -> Iterator[Conversation]:
    """Without end, the same for the same seed."""
    rng = random.Random(seed)
    names = [*SKILLS, "memory"]
    weights = [*(weight for _, weight in SKILLS.values()), 1.6]
    while True:
        (skill,) = rng.choices(names, weights)
        roll = rng.random()
        filler = 0 if roll < 0.45 else rng.randint(10, 120) if roll < 0.85 else rng.randint(120, 500)
        if roll > 0.96:
            filler = rng.randint(500, 1600)
        made = conversation(rng, skill, held_out=False, filler_tokens=filler)
        if rng.random() < 0.3:
            made.messages.insert(0, {"role": "system", "content": rng.choice(_SYSTEM_PROMPTS)})
        yield made
