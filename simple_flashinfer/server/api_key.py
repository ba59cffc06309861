"""The API key, looked at before anything of a request's body is."""

import secrets
from collections.abc import Container

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from simple_flashinfer.server.errors import ApiError, error_response


class ApiKeyCheck:
    """Middleware that answers with a 401 where the key is not as OpenAI's clients send it, nor as Anthropic's do.

    public: paths that need none.
    """

    def __init__(self, app: ASGIApp, key: str, public: Container[str | None]) -> None:
        self._app = app
        self._public = public
        self._expected = {"authorization": f"Bearer {key}".encode(), "x-api-key": key.encode()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and scope["path"] not in self._public and not self._is_right(Headers(scope=scope)):
            message = "The API key is missing or wrong; send it as `Authorization: Bearer KEY` or `x-api-key: KEY`."
            headers = {"WWW-Authenticate": "Bearer"}
            app = error_response(scope["path"], ApiError(401, message, code="invalid_api_key", headers=headers))
        await app(scope, receive, send)

    def _is_right(self, headers: Headers) -> bool:
        given = {name: headers.get(name, "").encode("latin-1") for name in self._expected}  # the bytes as they came
        return any(secrets.compare_digest(given[name], expected) for name, expected in self._expected.items())
