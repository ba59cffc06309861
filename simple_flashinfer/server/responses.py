"""/v1/responses: OpenAI's Responses API, answered by the way of chat completions."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from simple_flashinfer.server.body import StrictRoute
from simple_flashinfer.server.chat import chat_answers
from simple_flashinfer.server.choices import ChatChoice
from simple_flashinfer.server.errors import ApiError, as_api_error, invalid, renamed
from simple_flashinfer.server.respond import Answer, Numbered, generate_all, send
from simple_flashinfer.server.response_items import conversation, new_id, parse_input
from simple_flashinfer.server.response_output import Event, ResponseOutput
from simple_flashinfer.server.response_schema import NAMES, ResponsesRequest
from simple_flashinfer.server.response_store import StoredResponse
from simple_flashinfer.server.service import Piece, Service, Usage, service_of
from simple_flashinfer.server.sse import event

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/responses")
@router.post("/responses", include_in_schema=False)
async def create_response(body: ResponsesRequest, http: Request) -> Response:
    service = service_of(http)
    body.refuse_unsupported()
    input_items = parse_input(body.input)
    items = [*_earlier_items(service, body.previous_response_id), *input_items]
    answer = await _answer(service, body, conversation(items))
    reply = _Reply(service, body, answer, input_items, items)
    return await send(http, generate_all(service, [answer]), reply, stream=bool(body.stream))


def _earlier_items(service: Service, id_: str | None) -> list[dict[str, Any]]:
    if id_ is None:
        return []
    if (stored := service.responses.get(id_)) is None:
        message = f"Previous response with id {id_!r} not found."
        raise invalid(message, "previous_response_id", "previous_response_not_found")
    return stored.items


async def _answer(service: Service, body: ResponsesRequest, messages: list[dict[str, Any]]) -> Answer:
    """With truncation the oldest turns are left out, as few as it takes; a turn begins with a message of the user."""

    async def attempt(start: int) -> Answer:
        kept = [message for message in messages[:start] if message["role"] in ("system", "developer")]
        try:
            (answer,) = await chat_answers(service, body.as_chat([*kept, *messages[start:]]))
        except ApiError as error:
            raise renamed(error, NAMES) from error
        return answer

    try:
        return await attempt(0)
    except ApiError as error:
        if body.truncation != "auto" or error.code != "context_length_exceeded":
            raise
        too_long, found = error, None
    turns = [index for index, message in enumerate(messages) if index and message["role"] == "user"]
    low, high = 0, len(turns)
    while low < high:  # the first turn from which all fits
        middle = (low + high) // 2
        try:
            found, high = await attempt(turns[middle]), middle
        except ApiError as error:
            if error.code != "context_length_exceeded":
                raise
            low = middle + 1
    if found is None:
        raise too_long
    return found


class _Reply:
    def __init__(
        self,
        service: Service,
        body: ResponsesRequest,
        answer: Answer,
        input_items: list[dict[str, Any]],
        items: list[dict[str, Any]],
    ) -> None:
        assert isinstance(answer.choice, ChatChoice)
        self._store = service.responses if body.store is not False else None
        self._output = ResponseOutput(answer.choice)
        self._input_items, self._items = input_items, items
        self._usage = Usage(len(answer.request.prompt_token_ids))
        self._sequence_number = 0
        params = answer.request.params
        self._response: dict[str, Any] = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": service.config.model_name,
            "output": [],
            "temperature": params.temperature,
            "top_p": params.top_p or 1.0,
            "usage": None,
            **body.echo(),
        }

    async def whole(self, pieces: AsyncGenerator[Numbered, None]) -> dict[str, Any]:
        async with aclosing(pieces):
            async for _, piece in pieces:
                self._push(piece)
        self._complete()
        return self._response

    async def events(self, first: Numbered, pieces: AsyncGenerator[Numbered, None]) -> AsyncGenerator[bytes, None]:
        async with aclosing(pieces):
            yield self._event({"type": "response.created", "response": self._response})
            yield self._event({"type": "response.in_progress", "response": self._response})
            try:
                numbered: Numbered | None = first
                while numbered is not None:
                    for found in self._push(numbered[1]):
                        yield self._event(found)
                    numbered = await anext(pieces, None)
            except Exception as error:  # the status is sent already: the failure is an event, and the last one
                failure = {"code": "server_error", "message": as_api_error(error).message}
                self._end("failed", error=failure)
            else:
                self._complete()
            yield self._event({"type": f"response.{self._response['status']}", "response": self._response})

    def _push(self, piece: Piece) -> list[Event]:
        self._usage.add(piece)
        return self._output.push(piece)

    def _event(self, fields: Event) -> bytes:
        self._sequence_number += 1
        return event({**fields, "sequence_number": self._sequence_number - 1}, fields["type"])

    def _complete(self) -> None:
        if self._output.is_cut:
            self._end("incomplete", incomplete_details={"reason": "max_output_tokens"})
        else:
            self._end("completed", completed_at=int(time.time()))
        if self._store is not None:
            items = [*self._items, *self._response["output"]]
            self._store.add(StoredResponse(self._response, self._input_items, items))

    def _end(self, status: str, **fields: Any) -> None:
        output = self._output.items()
        self._response = {**self._response, "status": status, "output": output, "usage": _usage_json(self._usage), **fields}


def _usage_json(usage: Usage) -> dict[str, Any]:
    """Writing to the cache is not counted: it costs nothing here."""
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.num_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
        "total_tokens": usage.num_prompt_tokens + usage.num_tokens,
    }


def _stored(http: Request, id_: str, *parameters: str) -> StoredResponse:
    """Raises a 404 for an unknown response, and a 400 for a query parameter that is not among those given."""
    for name in http.query_params:
        if name not in parameters:
            raise invalid(f"{name} is not supported; leave it out", name, "unsupported_parameter")
    if (stored := service_of(http).responses.get(id_)) is None:
        raise ApiError(404, f"Response with id {id_!r} not found.", param="response_id", code="response_not_found")
    return stored


@router.get("/v1/responses/{response_id}")
@router.get("/responses/{response_id}", include_in_schema=False)
async def retrieve(response_id: str, http: Request) -> dict[str, Any]:
    return _stored(http, response_id).response


@router.delete("/v1/responses/{response_id}")
@router.delete("/responses/{response_id}", include_in_schema=False)
async def delete(response_id: str, http: Request) -> dict[str, Any]:
    _stored(http, response_id)
    service_of(http).responses.remove(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.post("/v1/responses/{response_id}/cancel")
@router.post("/responses/{response_id}/cancel", include_in_schema=False)
async def cancel(response_id: str, http: Request) -> None:
    _stored(http, response_id)
    raise invalid("Cannot cancel a synchronous response.", "response_id")


@router.get("/v1/responses/{response_id}/input_items")
@router.get("/responses/{response_id}/input_items", include_in_schema=False)
async def input_items(
    response_id: str,
    http: Request,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> dict[str, Any]:
    """Those of this response's own request, without the earlier conversation."""
    items = _stored(http, response_id, "limit", "order", "after").input_items
    if order == "desc":
        items = items[::-1]
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise invalid(f"after: there is no item {after!r}", "after")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(items) > limit,
    }
