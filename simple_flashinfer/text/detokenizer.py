"""Tokens to text as they come: whole characters only, spaces kept, nothing of a stop string given away.

The pieces of a text, put together, are the text that decoding all its tokens at once gives (but for bytes that are no
UTF-8, which decoders mark in more than one way). What a token adds depends on the
tokens before it (spaces, unfinished characters), so a short window of tokens is decoded with the new one and without
it, and the difference is the piece. (tokenizers' DecodeStream does the same, but raises when byte-fallback tokens turn out
to be no UTF-8, which a model may produce at any time.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from simple_flashinfer.types import FinishReason

# Tokens after which an unfinished character is none. Four bytes make one, but a longer wait keeps runs of wrong bytes whole.
_LONGEST_CHARACTER = 32


@dataclass(frozen=True, slots=True)
class TextDelta:
    """num_tokens: those taken in, up to and with the one that ended it. finish_reason: set on the last one."""

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None


class Detokenizer:
    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._decode = getattr(tokenizer, "backend_tokenizer", tokenizer).decode  # the fast one's own, without wrapping
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._window = 0  # ids from here on are decoded with each new token
        self._read = 0  # ids up to here are in _decoded
        self._before = ""  # text of ids[_window : _read]
        self._decoded = ""  # all text so far, what is held back included
        self._given = 0  # characters of it that were given out

    def push(self, token_ids: Sequence[int], finish_reason: FinishReason | None = None) -> TextDelta:
        """The text that is certain after these tokens.

        With a finish_reason they are the last: what was held back comes too, unfinished characters as U+FFFD. The token that
        made the engine stop is counted, but is no text. A stop string finishes the text, whatever the engine says.
        """
        final = finish_reason is not None
        shown = token_ids[:-1] if finish_reason is FinishReason.STOP else token_ids
        for count, token in enumerate(shown, 1):
            if (end := self._extend(self._step(token))) is not None:
                return self._give(end, count, FinishReason.STOP)
        if final and (end := self._extend(self._rest())) is not None:
            return self._give(end, len(token_ids), FinishReason.STOP)
        end = len(self._decoded) - (0 if final else self._held_back())
        return self._give(end, len(token_ids), finish_reason)

    def _give(self, end: int, num_tokens: int, finish_reason: FinishReason | None) -> TextDelta:
        text = self._decoded[self._given : end]
        self._given = end
        return TextDelta(text, num_tokens, finish_reason)

    def _extend(self, text: str) -> int | None:
        """Adds text; where a stop string begins, if one is complete now."""
        scan_from = max(self._given, len(self._decoded) - self._longest_stop + 1)
        self._decoded += text
        return min((at for stop in self._stop if (at := self._decoded.find(stop, scan_from)) >= 0), default=None)

    @property
    def _longest_stop(self) -> int:
        return max(map(len, self._stop), default=1)

    def _step(self, token: int) -> str:
        """What a token adds to the text; nothing while it ends in an unfinished character."""
        self._ids.append(token)
        text: str = self._decode(self._ids[self._window :], skip_special_tokens=True)
        if text.endswith("\ufffd") and len(self._ids) - self._read < _LONGEST_CHARACTER:
            return ""
        piece = text[len(self._before) :]
        if piece:  # a window must not begin with a token that is no text: what follows would lose its space
            self._window = self._read
            self._before = self._decode(self._ids[self._window :], skip_special_tokens=True)
        self._read = len(self._ids)
        return piece

    def _rest(self) -> str:
        """What was held back as unfinished."""
        text: str = self._decode(self._ids[self._window :], skip_special_tokens=True)
        return text[len(self._before) :]

    def _held_back(self) -> int:
        """Length of the longest end of the text that a stop string may begin with."""
        tail = self._decoded[self._given :][-self._longest_stop :]
        lengths = range(min(self._longest_stop - 1, len(tail)), 0, -1) if self._stop else ()
        return next((n for n in lengths if any(stop.startswith(tail[-n:]) for stop in self._stop)), 0)
