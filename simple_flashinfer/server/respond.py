"""From engine requests to an HTTP answer, whole or streamed, of one choice or several."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import JSONResponse, Response

from simple_flashinfer.server.choices import Choice, prompt_logprobs_json
from simple_flashinfer.server.errors import as_api_error
from simple_flashinfer.server.schemas import GenerationRequest
from simple_flashinfer.server.service import Piece, Service, Usage
from simple_flashinfer.server.sse import DONE, ClientLeftError, EventStream, event, until_disconnect
from simple_flashinfer.text.parsing.output import OutputParser
from simple_flashinfer.types import EngineRequest

_CLIENT_CLOSED_REQUEST = 499  # nginx's number; the client never sees it


@dataclass(frozen=True, slots=True)
class Wording:
    id_prefix: str
    object_name: str
    chunk_object_name: str


@dataclass(slots=True)
class Answer:
    """One request of the engine, and how its output is told.

    parser: finds reasoning and tool calls in it. shown: special tokens that are part of the text.
    """

    request: EngineRequest
    choice: Choice
    leader: bool = True  # the first of those with the same prompt
    parser: OutputParser | None = None
    shown: frozenset[str] = frozenset()


Numbered = tuple[int, Piece]


class Telling(Protocol):
    """How answers are told, in the words of one API or another."""

    async def whole(self, pieces: AsyncGenerator[Numbered, None]) -> dict[str, Any]:
        """The body of a plain response."""

    def events(self, first: Numbered, pieces: AsyncGenerator[Numbered, None]) -> AsyncGenerator[bytes, None]:
        """Server-sent events; a failure is the last of them."""


async def generate_all(service: Service, answers: list[Answer]) -> AsyncGenerator[Numbered, None]:
    """Pieces of all answers as they come, with the answer's index.

    All have their places in the engine, or none has: then it is an error before the first piece.
    """
    with service.engine.places([answer.request for answer in answers]):
        if len(answers) == 1:  # the usual case, without tasks
            async with aclosing(service.generate(answers[0].request, answers[0].parser, answers[0].shown)) as pieces:
                async for piece in pieces:
                    yield 0, piece
        else:
            async with aclosing(_generate_several(service, answers)) as several:
                async for numbered in several:
                    yield numbered


async def _generate_several(service: Service, answers: list[Answer]) -> AsyncGenerator[Numbered, None]:
    """The first answer to a prompt goes ahead: when it has a token the prompt is in the cache, and the others share it."""
    arrived: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
    computed = asyncio.Event()  # replaced for each prompt

    async def pump(index: int, answer: Answer, computed: asyncio.Event) -> None:
        try:
            if not answer.leader:
                await computed.wait()
            async with aclosing(service.generate(answer.request, answer.parser, answer.shown)) as pieces:
                async for piece in pieces:
                    computed.set()
                    arrived.put_nowait((index, piece))
        except Exception as error:
            arrived.put_nowait((index, error))
        finally:
            computed.set()

    tasks = []
    for index, answer in enumerate(answers):
        if answer.leader:
            computed = asyncio.Event()
        tasks.append(asyncio.create_task(pump(index, answer, computed)))
    unfinished = len(answers)
    try:
        while unfinished:
            index, result = await arrived.get()
            if isinstance(result, Exception):
                raise result
            unfinished -= result.finish_reason is not None
            yield index, result
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def respond(
    http: Request, service: Service, body: GenerationRequest, answers: list[Answer], wording: Wording
) -> Response:
    telling = _Choices(service, body, answers, wording)
    return await send(http, generate_all(service, answers), telling, stream=bool(body.stream))


async def send(http: Request, pieces: AsyncGenerator[Numbered, None], telling: Telling, *, stream: bool) -> Response:
    """Waits for the first piece in any case, so that an early failure still gets its proper status."""
    try:
        if not stream:
            return JSONResponse(await until_disconnect(http.receive, telling.whole(pieces)))
        first = await until_disconnect(http.receive, anext(pieces))
    except ClientLeftError:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    finally:
        if not stream:
            await pieces.aclose()
    return EventStream(telling.events(first, pieces), pieces)


class _Choices:
    def __init__(self, service: Service, body: GenerationRequest, answers: list[Answer], wording: Wording) -> None:
        self._tokenizer = service.tokenizer
        self._answers = answers
        self._wording = wording
        options = body.stream_options
        self._include_usage = bool(options and options.include_usage)
        self._usage_with_each = bool(options and options.continuous_usage_stats)
        self._show_token_ids = bool(body.return_token_ids)
        self._usage = Usage(sum(len(answer.request.prompt_token_ids) for answer in answers if answer.leader))
        self._prompt_logprobs: dict[int, list[Any]] = {}
        self._head = {
            "id": wording.id_prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": service.config.model_name,
        }

    def _push(self, index: int, piece: Piece) -> dict[str, Any] | None:
        answer = self._answers[index]
        fields = answer.choice.push(piece)  # may leave some of the piece out
        self._usage.add(piece, cached=answer.leader)
        if piece.prompt_logprobs is not None:
            ids = answer.request.prompt_token_ids.tolist()
            self._prompt_logprobs[index] = prompt_logprobs_json(self._tokenizer, ids, piece.prompt_logprobs)
        return fields

    async def whole(self, pieces: AsyncGenerator[Numbered, None]) -> dict[str, Any]:
        async with aclosing(pieces):
            async for index, piece in pieces:
                self._push(index, piece)
        choices = []
        for index, answer in enumerate(self._answers):
            choice = {"index": index, **answer.choice.whole()}
            if answer.request.params.prompt_logprobs is not None:
                choice["prompt_logprobs"] = self._prompt_logprobs.get(index)
            if self._show_token_ids:
                choice["prompt_token_ids"] = answer.request.prompt_token_ids.tolist()
            choices.append(choice)
        return {**self._head, "object": self._wording.object_name, "choices": choices, "usage": self._usage.as_json()}

    async def events(self, first: Numbered, pieces: AsyncGenerator[Numbered, None]) -> AsyncGenerator[bytes, None]:
        head = {**self._head, "object": self._wording.chunk_object_name}
        if self._include_usage:
            head["usage"] = None

        def chunk(index: int, fields: dict[str, Any]) -> bytes:
            usage = {"usage": self._usage.as_json()} if self._usage_with_each else {}
            return event({**head, **usage, "choices": [{"index": index, **fields}]})

        async with aclosing(pieces):
            for index, answer in enumerate(self._answers):
                if (opening := answer.choice.opening()) is not None:
                    if self._show_token_ids:
                        opening = {**opening, "prompt_token_ids": answer.request.prompt_token_ids.tolist()}
                    yield chunk(index, opening)
            try:
                numbered: Numbered | None = first
                while numbered is not None:
                    index, piece = numbered
                    fields = self._push(index, piece)
                    if fields is not None:
                        if piece.prompt_logprobs is not None:
                            fields["prompt_logprobs"] = self._prompt_logprobs[index]
                        yield chunk(index, fields)
                    numbered = await anext(pieces, None)
            except Exception as error:  # the status is sent already: the error is an event, and the last one
                yield event(as_api_error(error).body)
                return
            if self._include_usage:
                yield event({**head, "choices": [], "usage": self._usage.as_json()})
            yield DONE
