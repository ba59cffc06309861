"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API, answered by way of a chat."""

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from pydantic_core import from_json
from starlette.responses import Response

from simple_flashinfer.server.body import StrictRoute
from simple_flashinfer.server.chat import chat_answers, chat_prompt
from simple_flashinfer.server.errors import ApiError, anthropic_body, as_api_error, renamed
from simple_flashinfer.server.message_schemas import CountTokensRequest, MessagesRequest
from simple_flashinfer.server.respond import Answer, Numbered, generate_all, send
from simple_flashinfer.server.service import Piece, Service, Usage, service_of
from simple_flashinfer.server.sse import event

router = APIRouter(route_class=StrictRoute)
_DELTAS = {  # of the types of blocks: what a delta is called, and where its text is
    "thinking": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "tool_use": ("input_json_delta", "partial_json"),
}
_NAMES = {"response_format": "output_config.format"}  # of the chat's fields
_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


@router.post("/v1/messages")
@router.post("/messages", include_in_schema=False)
async def messages(body: MessagesRequest, http: Request) -> Response:
    service = service_of(http)
    try:
        (answer,) = await chat_answers(service, body.for_chat())
    except ApiError as error:
        raise renamed(error, _NAMES) from error
    shows_thinking = body.thinking is None or body.thinking.display != "omitted"
    message = _Message(service, answer, shows_thinking=shows_thinking)
    return await send(http, generate_all(service, [answer]), message, stream=bool(body.stream))


@router.post("/v1/messages/count_tokens")
@router.post("/messages/count_tokens", include_in_schema=False)
async def count_tokens(body: CountTokensRequest, http: Request) -> dict[str, int]:
    service = service_of(http)
    prompt = await chat_prompt(service, body.for_chat())
    return {"input_tokens": len(await service.tokenize(prompt, add_special_tokens=False, param="messages"))}


class _Message:
    """Takes in what a chat says of each piece, and gives back events; the whole answer is what was taken in."""

    def __init__(self, service: Service, answer: Answer, *, shows_thinking: bool = True) -> None:
        self._choice = answer.choice
        self._usage = Usage(len(answer.request.prompt_token_ids))
        self._head = {
            "id": "msg_" + uuid.uuid4().hex,
            "type": "message",
            "role": "assistant",
            "model": service.config.model_name,
        }
        self._shows_thinking = shows_thinking
        self._started = False
        self._blocks: list[tuple[dict[str, Any], list[str]]] = []  # as they begin, and the texts of their deltas
        self._end: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}

    async def whole(self, pieces: AsyncGenerator[Numbered, None]) -> dict[str, Any]:
        async with aclosing(pieces):
            async for _, piece in pieces:
                self._push(piece)
        return self._told([_complete(block, "".join(texts)) for block, texts in self._blocks])

    async def events(self, first: Numbered, pieces: AsyncGenerator[Numbered, None]) -> AsyncGenerator[bytes, None]:
        async with aclosing(pieces):
            try:
                numbered: Numbered | None = first
                while numbered is not None:
                    for told in self._push(numbered[1]):
                        yield event(told, told["type"])
                    numbered = await anext(pieces, None)
            except Exception as error:  # the status is sent already: the error is an event, and the last one
                yield event(anthropic_body(as_api_error(error)), "error")

    def _told(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "content": content, **self._end, "usage": self._usage_json()}

    def _usage_json(self) -> dict[str, Any]:
        """With Anthropic, input tokens are those that were not cached. Nothing is said to be written to the cache."""
        usage = self._usage
        return {
            "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.num_cached_tokens,
            "output_tokens": usage.num_tokens,
            "output_tokens_details": {"thinking_tokens": usage.num_reasoning_tokens},
        }

    def _push(self, piece: Piece) -> list[dict[str, Any]]:
        self._usage.add(piece)
        told = [] if self._started else [{"type": "message_start", "message": self._told([])}]
        self._started = True
        fields = self._choice.push(piece)
        if fields is None:
            return told
        delta = fields["delta"]
        if thinking := delta.get("reasoning"):
            shown = thinking if self._shows_thinking else ""
            told += self._add({"type": "thinking", "thinking": "", "signature": ""}, shown)
        calls = delta.get("tool_calls", [])
        # what goes on with a call comes before the text after it, and new calls come after the text before them
        told += [more for call in calls if "id" not in call for more in self._more(call["function"]["arguments"])]
        if text := delta.get("content"):
            told += self._add({"type": "text", "text": ""}, text)
        for call in calls:
            if "id" in call:
                function = call["function"]
                block = {"type": "tool_use", "id": call["id"], "name": function["name"], "input": {}}
                told += self._add(block, function["arguments"])
        return told + self._finish(fields["finish_reason"], piece.stop_reason)

    def _add(self, block: dict[str, Any], text: str) -> list[dict[str, Any]]:
        """To the last block if it is of the same kind; each call has its own."""
        if self._blocks and self._blocks[-1][0] == block:
            return self._more(text)
        closed = self._close()
        self._blocks.append((block, []))
        start = {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": block}
        return [*closed, start, *self._more(text)]

    def _more(self, text: str) -> list[dict[str, Any]]:
        block, texts = self._blocks[-1]
        texts.append(text)
        kind, key = _DELTAS[block["type"]]
        delta = {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": {"type": kind, key: text}}
        return [delta] if text else []

    def _close(self) -> list[dict[str, Any]]:
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}] if self._blocks else []

    def _finish(self, reason: str | None, stop: str | int | None) -> list[dict[str, Any]]:
        if reason is None:
            return []
        if isinstance(stop, str):
            self._end = {"stop_reason": "stop_sequence", "stop_sequence": stop}
        elif reason == "stop" and any(block["type"] == "tool_use" for block, _ in self._blocks):  # a named one
            self._end["stop_reason"] = "tool_use"
        else:
            self._end["stop_reason"] = _STOP_REASONS.get(reason, "end_turn")
        delta = {"type": "message_delta", "delta": dict(self._end), "usage": self._usage_json()}
        return [*self._close(), delta, {"type": "message_stop"}]


def _complete(block: dict[str, Any], text: str) -> dict[str, Any]:
    return {**block, "input": _input(text)} if block["type"] == "tool_use" else {**block, block["type"]: text}


def _input(text: str) -> dict[str, Any]:
    """The object that a call's arguments stand for; as much of it as was written if they break off.

    Arguments that are no object are kept as they are, under the key `arguments`. Streamed ones are the model's own text.
    """
    try:
        found = from_json(text or "{}", allow_inf_nan=False, allow_partial=True)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"arguments": text}
