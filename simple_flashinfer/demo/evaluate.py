"""Scores of the demo model on what it has not seen, by exact match, through the engine itself.

python3 -m simple_flashinfer.demo.evaluate FOLDER
"""

import random
import sys

from simple_flashinfer.demo.corpus import Conversation, conversation
from simple_flashinfer.demo.skills import SKILLS, Message
from simple_flashinfer.demo.tokenizer import answer_text
from simple_flashinfer.engine.llm import LLM
from simple_flashinfer.types import SamplingParams

_MEMORIES = {"memory, in a few turns": 0, "memory, after 300 tokens": 300, "memory, after 1,500 tokens": 1250}


def cases(count: int) -> dict[str, list[Conversation]]:
    """Held-out conversations for each skill, the same at each call."""
    found = {}
    for skill in SKILLS:
        rng = random.Random(f"evaluate {skill}")
        found[skill] = [conversation(rng, skill, held_out=True) for _ in range(count)]
    for name, tokens in _MEMORIES.items():
        rng = random.Random(f"evaluate {name}")
        found[name] = [conversation(rng, "memory", held_out=True, filler_tokens=tokens) for _ in range(count)]
    return found


def questions(made: Conversation) -> list[tuple[list[Message], str]]:
    """What is asked last, and the answer: two for a tool, the call and what is made of its result."""
    start = max(i for i, message in enumerate(made.messages) if message["role"] == "user")
    return [
        (made.messages[:i], answer_text(message))
        for i, message in enumerate(made.messages)
        if i > start and message["role"] == "assistant"
    ]


def evaluate(path: str, count: int = 100, show_wrong: int = 0) -> str:
    """A table of scores."""
    llm = LLM(path, max_sequence=32)
    lines = ["| skill | right, of held-out cases |", "| --- | --- |"]
    params = SamplingParams(temperature=0, max_tokens=120)
    for skill, conversations in cases(count).items():
        asked = [(made, *pair) for made in conversations for pair in questions(made)]
        prompts = [llm.tokenizer.encode_chat(messages, made.tools) for made, messages, _ in asked]
        outputs = llm.generate([p[-1900:] for p in prompts], params, use_tqdm=False)
        right = [output.text == want for output, (_, _, want) in zip(outputs, asked, strict=True)]
        lines.append(f"| {skill} | {sum(right) / len(right):.1%} of {len(right)} |")
        wrong = [(o.text, want) for o, (_, _, want), ok in zip(outputs, asked, right, strict=True) if not ok]
        lines += [f"    {got!r} instead of {want!r}" for got, want in wrong[:show_wrong]]
    return "\n".join(lines)


if __name__ == "__main__":
    print(evaluate(sys.argv[1], show_wrong=int(sys.argv[2]) if len(sys.argv) > 2 else 0))
