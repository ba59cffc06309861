"""One answer, in the words of chat or of plain completions.

A choice takes in pieces and gives back what a streamed chunk says of each; the whole answer is what was taken in. So the
two forms of an answer can't differ.
"""

from collections.abc import Callable
from typing import Any, Protocol

from simple_flashinfer.server.service import Piece
from simple_flashinfer.text.tokenizer import Tokenizer
from simple_flashinfer.types import FinishReason, TokenLogprobs


class Choice(Protocol):
    def opening(self) -> dict[str, Any] | None:
        """The first chunk's choice, before any text."""

    def push(self, piece: Piece) -> dict[str, Any] | None:
        """What a chunk's choice says of a piece, `finish_reason` included; None when there is nothing to say."""

    def whole(self) -> dict[str, Any]:
        """The choice of an answer that is complete."""


class ChatChoice:
    """tool_named: the client chose the tool itself, so calling it is no news."""

    def __init__(self, tokenizer: Tokenizer, *, tool_named: bool, token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._tool_named = tool_named
        self._show_token_ids = token_ids
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []
        self._has_logprobs = False
        self._token_ids: list[int] = []
        self._end: dict[str, Any] = {}

    def opening(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def push(self, piece: Piece) -> dict[str, Any] | None:
        parsed = piece.parsed
        delta: dict[str, Any] = {}
        if parsed.reasoning:
            delta["reasoning_content"] = delta["reasoning"] = parsed.reasoning
            self._reasoning.append(parsed.reasoning)
        if parsed.content:
            delta["content"] = parsed.content
            self._content.append(parsed.content)
        if parsed.tool_calls:
            delta["tool_calls"] = [self._call(call.index, call.id, call.name, call.arguments) for call in parsed.tool_calls]
        logprobs = None
        if piece.logprobs:
            self._has_logprobs = True
            entries = [self._logprob(entry) for entry in text_logprobs(piece)]
            self._logprobs += entries
            logprobs = {"content": entries, "refusal": None}
        fields: dict[str, Any] = {"delta": delta, "logprobs": logprobs, "finish_reason": None}
        if self._show_token_ids:
            fields["token_ids"] = piece.token_ids
            self._token_ids += piece.token_ids
        if piece.finish_reason is not None:
            called = self._calls and piece.finish_reason is FinishReason.STOP and not self._tool_named
            self._end = {
                "finish_reason": "tool_calls" if called else str(piece.finish_reason),
                "stop_reason": piece.stop_reason,
            }
            return {**fields, **self._end}
        return fields if delta or logprobs or self._show_token_ids else None

    def _call(self, index: int, id_: str | None, name: str | None, arguments: str) -> dict[str, Any]:
        if id_ is not None:
            self._calls.append({"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}})
            return {"index": index, **self._calls[-1], "function": dict(self._calls[-1]["function"])}
        self._calls[index]["function"]["arguments"] += arguments
        return {"index": index, "function": {"arguments": arguments}}

    def whole(self) -> dict[str, Any]:
        content, reasoning = "".join(self._content), "".join(self._reasoning)
        message: dict[str, Any] = {
            "role": "assistant", "content": content or (None if self._calls else ""), "refusal": None, "annotations": [],
        }  # fmt: skip
        if reasoning:
            message["reasoning_content"] = message["reasoning"] = reasoning
        if self._calls:
            message["tool_calls"] = self._calls
        logprobs = {"content": self._logprobs, "refusal": None} if self._has_logprobs else None
        fields = {"message": message, "logprobs": logprobs, **self._end}
        return {**fields, "token_ids": self._token_ids} if self._show_token_ids else fields

    def _logprob(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in entry.top]
        return {**self._token(entry.token_id, entry.logprob), "top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        content = self._tokenizer.token_bytes(token_id)
        return {"token": content.decode(errors="replace"), "logprob": finite(logprob), "bytes": list(content)}


class TextChoice:
    """echo: the prompt's tokens, when the answer is to begin with it. show_output: whether there is any more of it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        num_logprobs: int | None,
        echo: list[int] | None = None,
        show_output: bool = True,
        token_ids: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._num_logprobs = num_logprobs
        self._show_output = show_output
        self._show_token_ids = token_ids
        self._echo = echo
        self._texts: list[str] = [] if echo is None else [tokenizer.decode(echo)]
        self._token_ids: list[int] = []
        self._entries: list[TokenLogprobs | int] = []
        self._offset = 0  # of the next token, in characters
        self._end: dict[str, Any] = {}

    def opening(self) -> dict[str, Any] | None:
        return None

    def push(self, piece: Piece) -> dict[str, Any] | None:
        if not self._show_output:
            piece.text, piece.token_ids, piece.logprobs = "", [], []
        entries: list[TokenLogprobs | int] = []
        if self._echo is not None and piece.prompt_logprobs is not None and not self._entries:
            entries += [self._echo[0], *piece.prompt_logprobs]  # the first token has nothing before it
        entries += text_logprobs(piece)
        self._texts.append(piece.text)
        self._entries += entries
        logprobs = self._logprobs(entries) if self._num_logprobs is not None else None
        fields: dict[str, Any] = {"text": piece.text, "logprobs": logprobs, "finish_reason": None}
        if self._show_token_ids:
            fields["token_ids"] = piece.token_ids
            self._token_ids += piece.token_ids
        if piece.finish_reason is not None:
            self._end = {"finish_reason": str(piece.finish_reason), "stop_reason": piece.stop_reason}
            return {**fields, **self._end}
        return fields if piece.text or entries or self._show_token_ids else None

    def whole(self) -> dict[str, Any]:
        self._offset = 0
        logprobs = self._logprobs(self._entries) if self._num_logprobs is not None else None
        fields = {"text": "".join(self._texts), "logprobs": logprobs, **self._end}
        return {**fields, "token_ids": self._token_ids} if self._show_token_ids else fields

    def _logprobs(self, entries: list[TokenLogprobs | int]) -> dict[str, Any]:
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            token_id = entry if isinstance(entry, int) else entry.token_id
            text = self._text(token_id)
            found["tokens"].append(text)
            found["text_offset"].append(self._offset)
            self._offset += len(text)
            if isinstance(entry, int):
                found["token_logprobs"].append(None)
                found["top_logprobs"].append(None)
                continue
            found["token_logprobs"].append(finite(entry.logprob))
            top = {self._text(token): finite(logprob) for token, logprob in entry.top}
            found["top_logprobs"].append({**top, text: finite(entry.logprob)})
        return found

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")


def text_logprobs(piece: Piece) -> list[TokenLogprobs]:
    return piece.logprobs[:-1] if piece.ends_unseen else piece.logprobs


def finite(logprob: float) -> float:
    """JSON has no infinity: what can't be drawn gets the number that OpenAI has for it."""
    return max(logprob, -9999.0)


def prompt_logprobs_json(tokenizer: Tokenizer, token_ids: list[int], entries: list[TokenLogprobs]) -> list[Any]:
    """vLLM's form: nothing for the first token, then for each the likeliest ones and itself, by token id."""
    text: Callable[[int], str] = lambda token: tokenizer.token_bytes(token).decode(errors="replace")  # noqa: E731
    found: list[Any] = [None]
    for entry in entries:
        ranked = {token: (logprob, rank) for rank, (token, logprob) in enumerate(entry.top, 1)}
        ranked[entry.token_id] = (entry.logprob, entry.rank)
        found.append({
            str(token): {"logprob": finite(logprob), "rank": rank, "decoded_token": text(token)}
            for token, (logprob, rank) in ranked.items()
        })  # fmt: skip
    return found
