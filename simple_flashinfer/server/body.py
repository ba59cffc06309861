"""Bodies of requests: how much of one is taken in, and what counts as JSON.

Parsing and validation hold up the event loop, and with it every stream. They cost time by size, and far more by the number
of objects, so both are limited while the body arrives.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SPARE_BYTES = 16 * 2**20  # for names, escapes, tools and schemas
_SPARE_PARTS = 16_384
_SPARE_VALUES = 2**17  # beside one prompt of token ids, for others
_LARGE = 2**18  # bytes from which others have their turn between parsing and validation


class BodyLimit:
    """Middleware that ends a larger body with a 413, whether its length is told beforehand or not.

    Parts are counted by the characters that begin them, which are counted in texts too: there, one token has about one.

    max_bytes: of the longest text that the model can read. max_tokens: of one prompt.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_tokens: int) -> None:
        self._app = app
        self._max_bytes = _SPARE_BYTES + max_bytes
        self._most = (
            ("lists, objects and fields", b"[{:", _SPARE_PARTS + 2 * max_tokens),
            ("values", b",", _SPARE_VALUES + max_tokens),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        told = int(headers.get(b"content-length", 0))  # the server has checked that it is a number
        encoding = headers.get(b"content-encoding", b"identity").decode("latin-1")
        num_bytes, counts = 0, [0] * len(self._most)

        async def limited() -> Message:
            nonlocal num_bytes
            if encoding.lower() != "identity":
                raise HTTPException(415, f"Content-Encoding {encoding} is not supported; send the body as it is")
            self._check("bytes", told, self._max_bytes)
            message = await receive()
            if chunk := message.get("body"):
                num_bytes += len(chunk)
                self._check("bytes", num_bytes, self._max_bytes)
                for index, (name, marks, most) in enumerate(self._most):
                    counts[index] += sum(map(chunk.count, marks))
                    self._check(name, counts[index], most)
            return message

        await self._app(scope, limited, send)

    @staticmethod
    def _check(name: str, count: int, most: int) -> None:
        if count > most:
            raise HTTPException(413, f"The request body may have {most} {name} at most")


class _StrictRequest(Request):
    async def json(self) -> Any:
        parsed = orjson.loads(body := await self.body())
        if len(body) > _LARGE:
            await asyncio.sleep(0)
        return parsed


class StrictRoute(APIRoute):
    """JSON as its RFC has it, in UTF-8: no NaN, no half surrogate pairs, no number beyond a double, 1024 levels at most."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly
