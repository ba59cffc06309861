"""Pieces of text into the two shapes of an answer. Chat and plain completions differ in a few words: a `Wording`."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import JSONResponse, Response

from simple_flashinfer.server.errors import as_api_error
from simple_flashinfer.server.schemas import GenerationRequest
from simple_flashinfer.server.service import Service, Usage
from simple_flashinfer.server.sse import DONE, ClientLeftError, EventStream, event, until_disconnect
from simple_flashinfer.text.detokenizer import TextDelta
from simple_flashinfer.types import EngineRequest

_CLIENT_CLOSED_REQUEST = 499  # nginx's number; the client never sees it


class Wording(Protocol):
    id_prefix: str
    object_name: str
    chunk_object_name: str

    def choice(self, text: str) -> dict[str, Any]:
        """What a whole answer's choice says of its text."""

    def opening(self) -> dict[str, Any] | None:
        """The first chunk's choice, before any text."""

    def delta(self, text: str) -> dict[str, Any]:
        """What a chunk's choice says of a piece of text."""


async def respond(
    http: Request, service: Service, body: GenerationRequest, request: EngineRequest, wording: Wording
) -> Response:
    """Waits for the first piece in any case, so that an early failure still gets its proper status."""
    usage = Usage(len(request.prompt_token_ids))
    pieces = service.generate(request, usage)
    answer = _Answer(service, body, usage, wording)
    try:
        if not body.stream:
            return JSONResponse(await until_disconnect(http.receive, answer.whole(pieces)))
        first = await until_disconnect(http.receive, anext(pieces))
    except ClientLeftError:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    finally:
        if not body.stream:
            await pieces.aclose()
    return EventStream(answer.events(first, pieces), pieces)


class _Answer:
    def __init__(self, service: Service, body: GenerationRequest, usage: Usage, wording: Wording) -> None:
        self._wording = wording
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._usage = usage
        self._head = {
            "id": wording.id_prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": service.config.model_name,
        }

    async def whole(self, pieces: AsyncGenerator[TextDelta, None]) -> dict[str, Any]:
        texts, reason = [], None
        async with aclosing(pieces):
            async for piece in pieces:
                texts.append(piece.text)
                reason = piece.finish_reason
        choice = {"index": 0, **self._wording.choice("".join(texts)), "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": self._wording.object_name, "choices": [choice], "usage": self._usage.as_json()}

    async def events(self, first: TextDelta, pieces: AsyncGenerator[TextDelta, None]) -> AsyncGenerator[bytes, None]:
        head = {**self._head, "object": self._wording.chunk_object_name}
        if self._include_usage:
            head["usage"] = None

        def chunk(fields: dict[str, Any], reason: str | None = None) -> bytes:
            choice = {"index": 0, **fields, "logprobs": None, "finish_reason": reason}
            return event({**head, "choices": [choice]})

        async with aclosing(pieces):
            if (opening := self._wording.opening()) is not None:
                yield chunk(opening)
            try:
                piece = first
                while True:
                    if piece.text or piece.finish_reason:
                        yield chunk(self._wording.delta(piece.text), piece.finish_reason)
                    if piece.finish_reason:
                        break
                    piece = await anext(pieces)
            except Exception as error:  # the status is sent already: the error is an event, and the last one
                yield event(as_api_error(error).body)
                return
            if self._include_usage:
                yield event({**head, "choices": [], "usage": self._usage.as_json()})
            yield DONE
