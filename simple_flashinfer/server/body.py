"""Bodies of requests: how much of one is taken in, and what counts as JSON.

Parsing and validation hold up the event loop, and with it every stream. They cost time by size, and far more by the number
of objects, so both are limited while the body arrives.
"""

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SPARE_BYTES = 16 * 2**20
_SPARE_COLONS = 16_384


class BodyLimit:
    """Middleware that ends a larger body with a 413, whether its length is told beforehand or not.

    max_bytes: the longest text of use to the model; names, escapes and schemas get 16 MiB besides.
    max_colons: a text has about a token for each; the fields of objects, which have one each, get 16,384 besides.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_colons: int) -> None:
        self._app = app
        self._max_bytes = _SPARE_BYTES + max_bytes
        self._max_colons = _SPARE_COLONS + max_colons

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # the server has checked that it is a number
        num_bytes, num_colons = int(dict(scope["headers"]).get(b"content-length", 0)), 0
        told = num_bytes > 0

        async def limited() -> Message:
            nonlocal num_bytes, num_colons
            self._check(num_bytes, num_colons)
            message = await receive()
            if message["type"] == "http.request":
                chunk = message.get("body", b"")
                num_bytes += 0 if told else len(chunk)
                num_colons += chunk.count(b":")
                self._check(num_bytes, num_colons)
            return message

        await self._app(scope, limited, send)

    def _check(self, num_bytes: int, num_colons: int) -> None:
        if num_bytes > self._max_bytes:
            raise HTTPException(413, f"The request body may have {self._max_bytes} bytes at most.")
        if num_colons > self._max_colons:
            raise HTTPException(413, f"The request body may have {self._max_colons} fields at most.")


class _StrictRequest(Request):
    async def json(self) -> Any:
        return orjson.loads(await self.body())


class StrictRoute(APIRoute):
    """JSON as its RFC has it, in UTF-8: no NaN, no half surrogate pairs, no number beyond a double, 1024 levels at most."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly
