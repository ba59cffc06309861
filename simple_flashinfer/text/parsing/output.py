"""The parts of an answer, collected between two pushes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(slots=True)
class ToolCallDelta:
    """index: which call of the answer. id, name: complete, on its first delta only. arguments: more of their JSON text."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(slots=True)
class ParsedDelta:
    """What a piece of text added. There is one ToolCallDelta at most for each call."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)


class Output:
    """White space next to a tool call is markup, not content: it is held back until it is known what follows.

    Attributes:
        in_reasoning: whether more text would be reasoning.
        ended: the one call that there may be is complete; what follows it is left out.
        settled: neither will change any more.
    """

    def __init__(self, make_id: Callable[[], str], *, single_call: bool = False) -> None:
        self.in_reasoning = False
        self.ended = False
        self.settled = False
        self._make_id = make_id
        self._single_call = single_call
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, tuple[str | None, str | None, list[str]]] = {}
        self._space: list[str] = []  # follows the content that was given, unless a call is next
        self._after_call = False  # no content since the last call
        self.num_calls = 0
        self.num_arguments = 0  # characters of the last call's arguments

    def content(self, text: str) -> None:
        if self.ended:
            return
        if self._after_call:
            text = text.lstrip()
        said = text.rstrip()
        if said:
            self._content += [*self._space, said]
            self._space.clear()
            self._after_call = False
        if len(said) < len(text):
            self._space.append(text[len(said) :])

    def plain(self, text: str) -> None:
        """Content of an answer that can hold no calls."""
        self._content.append(text)

    def reasoning(self, text: str) -> None:
        self._reasoning.append(text)

    def begin_call(self, name: str, call_id: str | None = None) -> None:
        if self.ended:
            return
        self._calls[self.num_calls] = (call_id or self._make_id(), name, [])
        self._space.clear()
        self._after_call = True
        self.num_calls += 1
        self.num_arguments = 0

    def arguments(self, text: str) -> None:
        """More of those of the call that began last."""
        if self.ended:
            return
        self._calls.setdefault(self.num_calls - 1, (None, None, []))[2].append(text)
        self.num_arguments += len(text)

    def end_call(self) -> None:
        self.ended = self._single_call

    def finish(self) -> None:
        self._content += self._space
        self._space.clear()

    def take(self) -> ParsedDelta:
        """What has come since the last time."""
        calls = [ToolCallDelta(index, id_, name, "".join(text)) for index, (id_, name, text) in self._calls.items()]
        delta = ParsedDelta("".join(self._content), "".join(self._reasoning), calls)
        self._content, self._reasoning, self._calls = [], [], {}
        return delta


class OutputParser(Protocol):
    """For one answer. What is put out does not depend on how the text was cut."""

    out: Output

    def feed(self, text: str, final: bool = False) -> None:
        """More text. final: it was the last, and what was held back comes too. Never raises, whatever the text."""
