"""The FastAPI app: routers, the API key, and the form of errors."""

import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request

from simple_flashinfer import __version__
from simple_flashinfer.server import chat, completions, messages, responses, status, tokens
from simple_flashinfer.server.body import BodyLimit
from simple_flashinfer.server.errors import RESPONSES, ApiError, add_error_handlers
from simple_flashinfer.server.schemas import MAX_CHOICES
from simple_flashinfer.server.service import Service


def create_app(service: Service) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await service.engine.close()

    app = FastAPI(title="simple-flashinfer", version=__version__, lifespan=lifespan)
    app.state.service = service
    add_error_handlers(app)
    context = service.engine.info.max_model_len
    app.add_middleware(
        BodyLimit, max_bytes=context * service.tokenizer.longest_token, max_tokens=context, max_prompts=MAX_CHOICES
    )
    guarded = [Depends(_key_check(service.config.api_key))] if service.config.api_key else []
    for router in (chat.router, completions.router, messages.router, responses.router, tokens.router, status.router):
        app.include_router(router, dependencies=guarded, responses=RESPONSES)
    app.include_router(status.public, responses=RESPONSES)
    return app


def _key_check(key: str) -> Callable[[Request], Coroutine[Any, Any, None]]:
    """As OpenAI's clients send it, or as Anthropic's do."""
    expected = {"authorization": f"Bearer {key}".encode(), "x-api-key": key.encode()}

    async def check(http: Request) -> None:
        given = {name: http.headers.get(name, "").encode("latin-1") for name in expected}  # the bytes as they came
        if not any(secrets.compare_digest(given[name], expected[name]) for name in expected):
            raise ApiError(
                401, "The API key is missing or wrong; send it as `Authorization: Bearer KEY` or `x-api-key: KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    return check
