"""Scores of the demo model on what it has not seen, by exact match, through the engine itself."""

import argparse
import math
import random
from pathlib import Path

from simple_flashinfer.demo import DEMO_FOLDER
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


def evaluate(path: str, count: int = 200, show_wrong: int = 0) -> str:
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


_CARD = """\
# The demo model

A Llama of {parameters:.1f} million parameters that comes with simple-flashinfer, so that there is something to talk to on
any machine, and so that tests have answers that are right or wrong. It was trained on conversations that rules generate, by
`python3 -m simple_flashinfer.demo.train FOLDER`. It knows nothing of the world, and says so.

Scores on held-out cases. What is asked last (these two numbers, this list of words, this name for this memory, this wording
of a greeting) is never trained on in that skill; the single words are, and so are the fixed answers. A
case is right when the greedy answer is the one right answer, letter by letter, and ends by itself.

{scores}

Tool calls count twice, as the call (mostly one of two tools) and as what is told of its result. `memory` asks for what the
user said at the beginning. Made by `python3 -m simple_flashinfer.demo.evaluate --card`.
"""


def write_card(folder: Path, scores: str) -> None:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as weights:
        parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    (folder / "README.md").write_text(_CARD.format(parameters=parameters / 1e6, scores=scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=DEMO_FOLDER)
    parser.add_argument("--count", type=int, default=200, help="cases of each skill")
    parser.add_argument("--wrong", type=int, default=0, help="show so many wrong answers of each skill")
    parser.add_argument("--card", action="store_true", help="write the scores into the folder's README.md")
    options = parser.parse_args()
    scores = evaluate(str(options.folder), options.count, options.wrong)
    print(scores)
    if options.card:
        write_card(options.folder, scores)


if __name__ == "__main__":
    main()
