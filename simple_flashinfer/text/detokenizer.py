"""Tokens to text as they come: whole characters only, spaces kept, nothing of a stop string given away.

The pieces of a text, put together, are the text that decoding all its tokens at once gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers.decoders import DecodeStream

from simple_flashinfer.types import FinishReason


@dataclass(frozen=True, slots=True)
class TextDelta:
    """num_tokens: those taken in, up to and with the one that ended it. finish_reason: set on the last one."""

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None


class Detokenizer:
    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._fast: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._stream = DecodeStream(skip_special_tokens=True) if self._fast is not None else None
        self._stop = tuple(stop)
        self._ids: list[int] = []
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
            self._ids.append(token)
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
        if self._stream is not None:
            return self._stream.step(self._fast, token) or ""
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)  # slow tokenizers: all of it, each time
        return "" if text.endswith("\ufffd") else text[len(self._decoded) :]

    def _rest(self) -> str:
        """What decoding everything at once has more: the bytes of a character that was never finished."""
        whole: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return whole[len(self._decoded) :] if whole.startswith(self._decoded) else ""

    def _held_back(self) -> int:
        """Length of the longest end of the text that a stop string may begin with."""
        tail = self._decoded[self._given :]
        for length in range(min(self._longest_stop - 1, len(tail)), 0, -1):
            if any(stop.startswith(tail[-length:]) for stop in self._stop):
                return length
        return 0
