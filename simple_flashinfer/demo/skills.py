"""What the demo model learns, by rule: everything it is taught to say is written here.

Each skill is a function from a random generator to an `Exchange`: a question, its one right answer, and a key that says what
the question is about (the numbers, the words, the name). Keys are split by hash, so what is held out was never seen in
training: not a rephrasing of something seen, but other content. `corpus` strings exchanges into conversations.
"""

import hashlib
import json
import random
from collections.abc import Callable, Sequence
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
    NOUNS,
    THINGS,
    VERBS_PAST,
    a_city,
    a_name,
    any_word,
    made_up,
)

Message = dict[str, Any]
_HELD_OUT_SHARE = 20  # one key in so many


@dataclass(slots=True)
class Exchange:
    """messages: from the user's question to the answer, the assistant's messages included."""

    messages: list[Message]
    key: str
    tools: list[dict[str, Any]] = field(default_factory=list)


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
    "All right. What else can I do for you?": (
        ["", "Ah, ", "Oh, ", "Well, "],
        ["ok", "okay", "I see", "all right", "good", "nice", "cool", "great", "understood", "very good"],
        ["", "!", ".", " then", ", assistant"],
    ),
    "I am sorry to hear that. I am only a tiny model, but I listen.": (
        ["", "Hi, ", "Oh, ", "Well, "],
        ["I am sad", "I feel bad", "I am tired", "I am not well", "I had a bad day", "my day was bad", "I am unhappy"],
        ["", "!", ".", " today", " right now", ", assistant"],
    ),
    "I am glad to hear that!": (
        ["", "Hi, ", "Oh, ", "Well, "],
        ["I am happy", "I feel good", "I am fine", "I am well", "I had a good day", "my day was good", "I feel great"],
        ["", "!", ".", " today", " right now", ", assistant"],
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
    "tell me a joke about a {}", "write a story about the {}", "what should I eat in {}", "how does a {} work",
    "draw a {adjective} {}", "write a program that sorts a {}", "is it true that the {} is {adjective}", "who owns the {}",
    "when was the {} made", "where can I buy a {adjective} {}", "what is the meaning of {}", "which {} is the best",
    "what is the price of gold in {}", "who is the mayor of {}", "how many {} are there in the world",
    "recommend a film about a {}", "what do you think of the {}", "sing a song about {}", "why do people like the {}",
    "how heavy is a {adjective} {}", "what is the square root of {year}", "what happened in {year}", "who was king in {year}",
]  # fmt: skip
_UNKNOWN = "I do not know that. I am a tiny model; serve a larger one with --model."


def unknown(rng: random.Random) -> Exchange:
    thing = made_up(rng) if rng.random() < 0.2 else rng.choice(NOUNS + CITIES)
    core = rng.choice(_UNKNOWN_CORES)
    text = core.format(thing, year=rng.randint(1950, 2025), adjective=rng.choice(ADJECTIVES))
    text = rng.choice(["", "", "Tell me, ", "Do you know ", "Hey, "]) + text + rng.choice(["?", "", "?", " please"])
    return ask(text[0].upper() + text[1:] if rng.random() < 0.7 else text, _UNKNOWN, thing + core)


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
# Flags that have been there from the beginning and will stay; `--help` knows them all.
_TAUGHT = {
    "model", "host", "port", "api_key", "served_model_name", "max_waiting", "device", "torch_dtype", "max_model_len", "max_sequence",
    "max_num_batched_tokens", "seed", "page_size", "prefix_caching", "memory_utilization", "kv_cache_memory", "attention_backend",
    "torch_compile", "engine_process",
}  # fmt: skip
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
        f = rng.choice([f for f in fields(Config) if f.name in _TAUGHT])
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


_SHARES = (0.0, 0.0, 0.3)
_DRILL_SHARES = (0.0, 0.3, 1.0)


def _any_words(rng: random.Random, low: int, high: int, shares: Sequence[float] = _SHARES) -> list[str]:
    """Made-up words, names and numbers as well, which are one of these shares of a list."""
    others: list[Callable[[], str]] = [lambda: made_up(rng), lambda: a_name(rng), lambda: str(rng.randint(0, 9999))]
    share = rng.choice(shares)
    return [rng.choice(others)() if rng.random() < share else word for word in _some_words(rng, low, high)]


def _listed(rng: random.Random, words: list[str]) -> str:
    return rng.choice([" ", ", ", ", "]).join(words)


def repeat(rng: random.Random, most: int = 8, shares: Sequence[float] = _SHARES) -> Exchange:
    words = _any_words(rng, 1, most, shares)
    text = rng.choice(["Repeat: {}", "Say this: {}", "Say {}", "Repeat after me: {}", "Write this again: {}"])
    return ask(text.format(" ".join(words)), " ".join(words), " ".join(words))


def reverse(rng: random.Random, most: int = 6, shares: Sequence[float] = _SHARES) -> Exchange:
    words = _any_words(rng, 2, most, shares)
    text = rng.choice(["Reverse these words: {}", "Reverse the list: {}", "Say backwards: {}", "In reverse order: {}"])
    return ask(text.format(_listed(rng, words)), " ".join(reversed(words)), " ".join(words))


def sort(rng: random.Random, most: int = 5) -> Exchange:
    words = _some_words(rng, 2, most)
    text = rng.choice(["Sort these words: {}", "Sort: {}", "In alphabetical order: {}", "Sort the list: {}"])
    return ask(text.format(_listed(rng, words)), " ".join(sorted(words)), " ".join(words))


def count(rng: random.Random) -> Exchange:
    words = _some_words(rng, 1, 9)
    text = rng.choice(["How many words: {}", "Count the words: {}", "How many words are in this list: {}", "Count: {}"])
    return ask(text.format(_listed(rng, words)), str(len(words)), " ".join(words))


def capitalise(rng: random.Random, most: int = 5, shares: Sequence[float] = (0.0,)) -> Exchange:
    words = _any_words(rng, 1, most, shares) if any(shares) else _some_words(rng, 1, most)
    text = rng.choice(["Capitalize: {}", "Capitalize each word: {}", "Write with capital letters: {}"])
    return ask(text.format(" ".join(words)), " ".join(word.capitalize() for word in words), " ".join(words))


DRILLS: dict[str, Callable[[random.Random], Exchange]] = {
    "repeat": lambda rng: repeat(rng, 16, _DRILL_SHARES),
    "reverse": lambda rng: reverse(rng, 9, _DRILL_SHARES),
    "sort": lambda rng: sort(rng, 7),
    "capitalise": lambda rng: capitalise(rng, 8, _DRILL_SHARES),
}
"""What the skills of these names ask, with longer lists and more words that no list holds."""


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
        "name": a_name(rng), "city": a_city(rng), "job": rng.choice(JOBS), "colour": rng.choice(COLOURS),
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


@dataclass(frozen=True, slots=True)
class _Tool:
    names: list[str]
    descriptions: list[str]
    arguments: dict[
        str, tuple[list[str], Callable[[random.Random], str]]
    ]  # in questions: what a schema may call it, its values
    questions: list[str]
    answer: str
    result: Callable[[random.Random], str]


_CITY = (["city", "place", "location", "town"], a_city)
_NAME = (["name", "person", "who", "recipient"], a_name)
_ITEM = (["item", "thing", "object", "product"], lambda rng: rng.choice(THINGS + FOODS))
_FOOD = (["item", "food", "kind", "pie"], lambda rng: rng.choice(FOODS))
_COLOUR = (["color", "colour", "paint"], lambda rng: rng.choice(COLOURS))
_TEXT = (["text", "message", "content", "body"], lambda rng: rng.choice(NOUNS))
_TOOLS = [
    _Tool(["get_weather", "weather", "current_weather", "fetch_weather"], ["The weather in a city", "Get the current weather"],
     {"city": _CITY}, ["What is the weather in {city}?", "Is it warm in {city}?", "How is the weather in {city} now?",
     "Tell me the weather of {city}.", "What is the weather like in {city}?"], "The weather in {city} is {result}.",
     lambda rng: rng.choice(ADJECTIVES)),
    _Tool(["get_time", "time_in", "clock", "local_time"], ["The time in a city", "Tell the local time"], {"city": _CITY},
     ["What time is it in {city}?", "Tell me the time in {city}.", "How late is it in {city}?"], "In {city} it is {result}.",
     lambda rng: f"{rng.randint(0, 23)}:{rng.randint(10, 59)}"),
    _Tool(["get_price", "price_of", "look_up_price", "cost"], ["The price of a thing", "Look up what a thing costs"],
     {"item": _ITEM}, ["What does a {item} cost?", "How much is the {item}?", "Tell me the price of a {item}."],
     "The {item} costs {result} dollars.", lambda rng: str(rng.randint(2, 99))),
    _Tool(["find_person", "where_is", "locate", "find"], ["Where a person is", "Find a person"], {"name": _NAME},
     ["Where is {name}?", "Find {name}.", "Where can I find {name}?"], "{name} is in {result}.", a_city),
    _Tool(["get_job", "job_of", "profession", "look_up_job"], ["The job of a person", "Look up a profession"], {"name": _NAME},
     ["What is the job of {name}?", "What does {name} do for a living?", "Which job has {name}?"], "{name} is a {result}.",
     lambda rng: rng.choice(JOBS)),
    _Tool(["send_message", "send", "write_to", "message"], ["Send a word to a person", "Send a message"],
     {"name": _NAME, "text": _TEXT}, ["Send {text} to {name}.", "Tell {name}: {text}.", "Write {text} to {name}."],
     "I sent {text} to {name}: {result}.", lambda rng: rng.choice(["done", "failed", "received"])),
    _Tool(["paint", "set_color", "change_color", "color_it"], ["Paint a thing in a color", "Change the color of a thing"],
     {"item": _ITEM, "colour": _COLOUR}, ["Paint the {item} {colour}.", "Make the {item} {colour}.", "I want a {colour} {item}."],
     "The {item} in {colour}: {result}.", lambda rng: rng.choice(["done", "failed", "started"])),
    _Tool(["count_items", "stock", "how_many", "inventory"], ["How many there are in a shop", "Count the stock"],
     {"item": _FOOD, "city": _CITY}, ["How many {item} pies are in {city}?", "Count the {item} pies in {city}."],
     "There are {result} {item} pies in {city}.", lambda rng: str(rng.randint(2, 99))),
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Offer:
    """A tool under the names that it has in one conversation."""

    tool: _Tool
    name: str
    arguments: dict[str, str]  # question's word -> schema's word
    schema: dict[str, Any]


def _offer(rng: random.Random, tool: _Tool, varied: bool) -> _Offer:
    name = "_".join(rng.sample(NOUNS, 2)) if varied else rng.choice(tool.names)
    arguments = {word: rng.choice(choices) for word, (choices, _) in tool.arguments.items()}
    if varied:
        arguments = dict(zip(arguments, rng.sample(NOUNS, len(arguments)), strict=True))
    properties = {argument: {"type": "string"} for argument in arguments.values()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": rng.choice(tool.descriptions), "parameters": parameters}
    return _Offer(tool, name, arguments, {"type": "function", "function": function})


def call_tool(rng: random.Random) -> Exchange:
    return tool_exchanges(rng)[-1]


def tool_exchanges(rng: random.Random, rounds: int = 1, varied: bool = False) -> list[Exchange]:
    """One or two tools are given; each question needs one of them, whose result is then told.

    varied: names and values are any words, so that they have to be read.
    """
    offers = [_offer(rng, tool, varied) for tool in rng.sample(_TOOLS, rng.choice([1, 2, 2]))]
    return [_tool_exchange(rng, offers, varied) for _ in range(rounds)]


def _tool_exchange(rng: random.Random, offers: list[_Offer], varied: bool) -> Exchange:
    chosen = rng.choice(offers)
    tool = chosen.tool
    values = {word: any_word(rng) if varied else make(rng) for word, (_, make) in tool.arguments.items()}
    result = tool.result(rng)
    arguments = {chosen.arguments[word]: value for word, value in values.items()}
    messages: list[Message] = [
        {"role": "user", "content": phrase(rng, rng.choice(tool.questions).format(**values))},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": chosen.name, "arguments": arguments}}]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": tool.answer.format(result=result, **values)},
    ]  # fmt: skip
    return Exchange(messages, tool.names[0] + json.dumps(values), [offer.schema for offer in offers])


SKILLS: dict[str, Callable[[random.Random], Exchange]] = {
    "small talk": small_talk,
    "unknown": unknown,
    "server": about_the_server,
    "arithmetic": arithmetic,
    "repeat": repeat,
    "reverse": reverse,
    "sort": sort,
    "count": count,
    "capitalise": capitalise,
    "extract": extract,
    "tools": call_tool,
}
