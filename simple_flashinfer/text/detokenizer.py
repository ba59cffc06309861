"""Tokens to text as they come: whole characters only, spaces kept, nothing of a stop string given away.

The pieces of a text, put together, are the text that decoding all its tokens at once gives (but for bytes that are no
UTF-8, which decoders mark in more than one way). What a token adds depends on the
tokens before it (spaces, unfinished characters), so a short window of tokens is decoded with the new one and without
it, and the difference is the piece. Tokens that come together are decoded together where that gives the same.
(tokenizers' DecodeStream does this too, a token at a time, but raises when byte-fallback tokens turn out to be no UTF-8,
which a model may produce at any time.)
"""

from collections.abc import Container, Sequence
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
    stop_string: str | None = None  # that ended the text


class Detokenizer:
    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        *,
        hidden: Container[int] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """hidden: tokens that are no text. include_stop: what stops the text is its end. Nothing stops before min_tokens."""
        self._hidden = hidden
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._decode = getattr(tokenizer, "backend_tokenizer", tokenizer).decode  # the fast one's own, without wrapping
        self._stop = tuple(stop)
        self._longest_stop = max(map(len, self._stop), default=1)
        self._ids: list[int] = []  # the window: they are decoded with what comes next
        self._read = 0  # so many of them are in the text
        self._before = ""  # text of these
        self._held = ""  # text that was not given out
        self._searched = 0  # characters of it in which no stop string may begin

    def push(self, token_ids: Sequence[int], finish_reason: FinishReason | None = None) -> TextDelta:
        """The text that is certain after these tokens.

        With a finish_reason they are the last: what was held back comes too, unfinished characters as U+FFFD. The token that
        made the engine stop is counted, but is no text. A stop string finishes the text, whatever the engine says.
        """
        final = finish_reason is not None
        hide_last = finish_reason is FinishReason.STOP and not self._include_stop
        tokens = token_ids[:-1] if hide_last else token_ids
        if self._stop:
            for count, token in enumerate(tokens, 1):
                self._num_tokens += 1
                if (found := self._extend(self._step((token,)))) is not None:
                    return self._stopped(*found, count)
        else:  # nothing depends on which of them brought what: all at once is several times faster
            self._held += self._step(tokens)
        if final and (found := self._extend(self._rest())) is not None:
            return self._stopped(*found, len(token_ids))
        end = len(self._held) - (0 if final else self._held_back())
        return self._give(end, len(token_ids), finish_reason)

    def _stopped(self, at: int, stop: str, num_tokens: int) -> TextDelta:
        return self._give(at + len(stop) * self._include_stop, num_tokens, FinishReason.STOP, stop)

    def _give(
        self, end: int, num_tokens: int, finish_reason: FinishReason | None, stop_string: str | None = None
    ) -> TextDelta:
        text, self._held = self._held[:end], self._held[end:]
        self._searched = max(0, self._searched - end)
        return TextDelta(text, num_tokens, finish_reason, stop_string)

    def _extend(self, text: str) -> tuple[int, str] | None:
        """Adds text; where a stop string begins, and which, if one is complete now."""
        scan_from = max(self._searched, len(self._held) - self._longest_stop + 1)
        self._held += text
        if self._num_tokens < self._min_tokens:
            self._searched = len(self._held)
            return None
        found = [(at, stop) for stop in self._stop if (at := self._held.find(stop, scan_from)) >= 0]
        return min(found, default=None)

    def _step(self, tokens: Sequence[int]) -> str:
        """What tokens add to the text; nothing while it ends in an unfinished character."""
        shown = [token for token in tokens if token not in self._hidden]
        if len(shown) > 1 and (together := self._step_together(shown)) is not None:
            return together
        return "".join([self._step_one(token) for token in shown])

    def _step_one(self, token: int) -> str:
        ids = [*self._ids, token]
        text: str = self._decode(ids, skip_special_tokens=False)
        if text.endswith("\ufffd") and len(ids) - self._read < _LONGEST_CHARACTER:
            self._ids = ids
            return ""
        piece = text[len(self._before) :]
        if piece:  # a window must not begin with a token that is no text: what follows would lose its space
            ids = ids[self._read :]
            self._before = self._decode(ids, skip_special_tokens=False)
        self._ids, self._read = ids, len(ids)
        return piece

    def _step_together(self, tokens: list[int]) -> str | None:
        """None where one by one they may add something else: unfinished or wrong characters, or a last one without text."""
        ids = self._ids + tokens
        text: str = self._decode(ids, skip_special_tokens=False)
        without_last: str = self._decode(ids[:-1], skip_special_tokens=False)
        if "\ufffd" in text or without_last.endswith("\ufffd") or without_last == text:
            return None
        piece = text[len(self._before) :]
        self._ids, self._read = ids[-1:], 1
        self._before = self._decode(self._ids, skip_special_tokens=False)
        return piece

    def _rest(self) -> str:
        """What was held back as unfinished."""
        text: str = self._decode(self._ids, skip_special_tokens=False)
        return text[len(self._before) :]

    def _held_back(self) -> int:
        """Length of the longest end of the text that a stop string may begin with."""
        if not self._stop:
            return 0
        tail = self._held[self._searched :][-self._longest_stop :]
        lengths = range(min(self._longest_stop - 1, len(tail)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(tail[-n:]) for stop in self._stop)), 0)
