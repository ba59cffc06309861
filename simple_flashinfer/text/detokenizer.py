"""Tokens to text as they come: whole characters only, spaces kept, nothing of a stop string given away.

The pieces of a text, put together, are the text that decoding all its tokens at once gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers.decoders import DecodeStream


@dataclass(frozen=True, slots=True)
class TextDelta:
    text: str
    stopped: bool = False  # a stop string came: the text ends before it
    num_tokens: int = 0  # tokens taken in: all that were given, or those up to the stop string


class Detokenizer:
    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        self._stream = DecodeStream(skip_special_tokens=True) if self._fast is not None else None
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._decoded = ""  # all text so far, what is held back included
        self._given = 0  # characters of it that were given out

    def push(self, token_ids: Sequence[int], final: bool = False) -> TextDelta:
        """The text that is certain after these tokens. With `final`, the rest: unfinished characters come as U+FFFD."""
        for count, token in enumerate(token_ids, 1):
            self._ids.append(token)
            scan_from = max(self._given, len(self._decoded) - self._longest_stop + 1)
            self._decoded += self._step(token)
            if (stopped := self._cut_at_stop(scan_from, count)) is not None:
                return stopped
        if final:
            scan_from = max(self._given, len(self._decoded) - self._longest_stop + 1)
            self._decoded += self._rest()
            if (stopped := self._cut_at_stop(scan_from, len(token_ids))) is not None:
                return stopped
        end = len(self._decoded) if final else len(self._decoded) - self._held_back()
        text = self._decoded[self._given : end]
        self._given = end
        return TextDelta(text, num_tokens=len(token_ids))

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

    def _cut_at_stop(self, scan_from: int, num_tokens: int) -> TextDelta | None:
        found = [at for stop in self._stop if (at := self._decoded.find(stop, scan_from)) >= 0]
        if not found:
            return None
        text = self._decoded[self._given : min(found)]
        self._given = len(self._decoded)
        return TextDelta(text, stopped=True, num_tokens=num_tokens)

    def _held_back(self) -> int:
        """Length of the longest end of the text that a stop string may begin with."""
        tail = self._decoded[self._given :]
        for length in range(min(self._longest_stop - 1, len(tail)), 0, -1):
            if any(stop.startswith(tail[-length:]) for stop in self._stop):
                return length
        return 0
