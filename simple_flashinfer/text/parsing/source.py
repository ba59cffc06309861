"""Text that comes in pieces, read as if it were all there.

Readers are generators that yield where they need more text; what they decide depends on the text alone, never on where it
was cut. They read each character once: no more than a marker's length waits unread for the next piece.
"""

import re
from collections.abc import Callable, Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Reading: TypeAlias = Generator[None, None, T]
Give: TypeAlias = Callable[[str], None]  # takes the pieces of what is read

_SPACE = re.compile(r"\s+")
_IN_STRING = re.compile(r'[^"\\]+')
_SCALAR = re.compile(r"[\w.+-]+")
_BETWEEN = re.compile(r'[^"{}\[\]<`]+')


def ignore(_: str) -> None:
    """Gives to nobody."""


class Source:
    def __init__(self) -> None:
        self._text = ""
        self._at = 0  # what lies before was read
        self._record: list[str] | None = None
        self._final = False

    def feed(self, text: str, final: bool) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0
        self._final = final

    def record(self, text: str = "") -> None:
        """Keeps what is read from here on (after this text), in case that it turns out to be content."""
        self._record = [text]

    def recorded(self) -> str:
        """What was kept; nothing more is."""
        text = "".join(self._record or ())
        self._record = None
        return text

    def peek(self) -> Reading[str]:
        """The next character, unread; "" at the end."""
        while self._at == len(self._text):
            if self._final:
                return ""
            yield
        return self._text[self._at]

    def take(self, length: int) -> str:
        text = self._text[self._at : self._at + length]
        self._at += len(text)
        if self._record is not None:
            self._record.append(text)
        return text

    def until(self, markers: tuple[str, ...], give: Give) -> Reading[str]:
        """Reads up to and with the first of the markers, which is returned and not given; "" at the end.

        No marker may begin with another, nor hold one that is complete before it is.
        """
        pattern = re.compile("|".join(map(re.escape, markers)) or r"(?!)")
        while True:
            if match := pattern.search(self._text, self._at):
                give(self.take(match.start() - self._at))
                return self.take(len(match[0]))
            give(self.take(len(self._text) - self._at - (0 if self._final else self._held_back(markers))))
            if self._final:
                return ""
            yield

    def _held_back(self, markers: tuple[str, ...]) -> int:
        """Length of the longest end of the text that a marker may begin with."""
        longest = min(max(map(len, markers), default=1) - 1, len(self._text) - self._at)
        return next((n for n in range(longest, 0, -1) if any(m.startswith(self._text[-n:]) for m in markers)), 0)

    def literal(self, *literals: str) -> Reading[str]:
        """Reads the longest of these that comes next and returns it; reads nothing and returns "" if none does."""
        longest = max(map(len, literals))
        while True:
            text = self._text[self._at : self._at + longest]
            if self._final or not any(literal != text and literal.startswith(text) for literal in literals):
                return self.take(max((len(literal) for literal in literals if text.startswith(literal)), default=0))
            yield

    def run(self, pattern: re.Pattern[str], give: Give = ignore) -> Reading[None]:
        """Reads as far as a pattern for one or more of certain characters goes."""
        while (yield from self.peek()):
            if not (match := pattern.match(self._text, self._at)):
                return
            give(self.take(len(match[0])))

    def word(self, pattern: re.Pattern[str]) -> Reading[str]:
        """As run, but returns what it read."""
        pieces: list[str] = []
        yield from self.run(pattern, pieces.append)
        return "".join(pieces)

    def space(self) -> Reading[None]:
        yield from self.run(_SPACE)

    def json_value(self, give: Give) -> Reading[None]:
        """Reads a JSON value and gives its very text; one that breaks off or is wrong is read as far as it may be JSON.

        Only strings and brackets are understood. JSON has no < and no ` outside strings, so a marker that begins with one
        ends a value that was never closed.
        """
        depth = 0
        while char := (yield from self.peek()):
            if char == '"':
                yield from self.json_string(give)
            elif char in "{[":
                give(self.take(1))
                depth += 1
            elif depth == 0:
                yield from self.run(_SCALAR, give)
            elif char in "}]":
                give(self.take(1))
                depth -= 1
            elif char in "<`":
                return
            else:
                yield from self.run(_BETWEEN, give)
            if depth == 0:
                return

    def json_string(self, give: Give) -> Reading[bool]:
        """As json_value; whether the string was closed."""
        give(self.take(1))
        while char := (yield from self.peek()):
            if char == '"':
                give(self.take(1))
                return True
            if char == "\\":
                give(self.take(1))
                if (yield from self.peek()):
                    give(self.take(1))
            else:
                yield from self.run(_IN_STRING, give)
        return False
