"""The FastAPI app: routers, what is done for all of them, and the form of errors."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from simple_flashinfer import __version__
from simple_flashinfer.server import chat, completions, messages, responses, status, tokens
from simple_flashinfer.server.api_key import ApiKeyCheck
from simple_flashinfer.server.body import BodyLimit
from simple_flashinfer.server.errors import RESPONSES, add_error_handlers
from simple_flashinfer.server.service import Service


class _Normalize:
    """Middleware: HEAD is answered like GET (uvicorn leaves the body out), and a slash at a path's end means nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            scope = {**scope, "method": method, "path": scope["path"].rstrip("/") or "/"}
        await self._app(scope, receive, send)


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
    app.add_middleware(BodyLimit, max_bytes=context * service.tokenizer.longest_token, max_tokens=context)
    documentation = {app.docs_url, app.redoc_url, app.openapi_url, app.swagger_ui_oauth2_redirect_url}
    if key := service.config.api_key:
        app.add_middleware(ApiKeyCheck, key=key, public=documentation | status.PUBLIC_PATHS)
    if origins := service.config.cors_origins:  # outside of the key: browsers ask first, without it
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["Retry-After"]
        )
    app.add_middleware(_Normalize)
    for module in (chat, completions, messages, responses, tokens, status):
        app.include_router(module.router, responses=RESPONSES)
    return app
