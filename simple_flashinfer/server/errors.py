"""Every error leaves in OpenAI's form: {"error": {"message", "type", "param", "code"}}. Built here and nowhere else.

Those of the Messages API leave in Anthropic's: {"type": "error", "error": {"type", "message"}}.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from simple_flashinfer.engine.async_engine import QueueFullError
from simple_flashinfer.types import EngineDeadError

logger = logging.getLogger(__name__)

_MAX_MESSAGE = 600  # characters; what a client sent may be in it
_MAX_NAME = 100
_RETRY_AFTER_SECONDS = "1"
_CODES = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
_ANTHROPIC_OVERLOADED = 529


class ErrorDetails(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetails


# for the OpenAPI document
RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request can't be served as it is; `param` names the field"},
    401: {"model": ErrorBody, "description": "The API key is missing or wrong"},
    404: {"model": ErrorBody, "description": "There is no such address or model"},
    413: {"model": ErrorBody, "description": "The request body is too large"},
    "4XX": {"model": ErrorBody, "description": "Any other mistake of the client"},
    500: {"model": ErrorBody, "description": "A mistake of the server"},
    503: {"model": ErrorBody, "description": "The server is full (try again), or its engine stopped working"},
}


class ApiError(Exception):
    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers
        self.message = _shortened(message, _MAX_MESSAGE)
        self.param = None if param is None else _shortened(param, _MAX_NAME)

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}}


def _shortened(text: str, most: int) -> str:
    """Its beginning and end; always valid Unicode."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return text.encode(errors="backslashreplace").decode()


def _type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status >= 500:
        return "server_error" if status != 503 else "service_unavailable_error"
    return "invalid_request_error"


def anthropic_body(error: ApiError) -> dict[str, Any]:
    """Anthropic's form has no place for the field that is at fault, so the message names it."""
    known = {
        401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
        429: "rate_limit_error",
    }  # fmt: skip
    kind = known.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    if error.code == "queue_full":
        kind = "overloaded_error"
    message = error.message if (error.param or "") in error.message else f"{error.param}: {error.message}"
    return {"type": "error", "error": {"type": kind, "message": message}}


def invalid(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """One that names the field by which the client knows it. names: those of the client, by ours."""
    name = (error.param or "").partition(".")[0]
    if name not in names:
        return error
    message = error.message.replace(error.param or name, names[name]).replace(name, names[name])
    return ApiError(error.status, message, param=names[name], code=error.code, headers=error.headers)


def as_api_error(error: Exception) -> ApiError:
    """The answer to any exception; what is not foreseen is a 500 that says nothing of the inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(
            503, f"The server is full: {error}. Try again later.", code="queue_full",
            headers={"Retry-After": _RETRY_AFTER_SECONDS},
        )  # fmt: skip
    if isinstance(error, EngineDeadError):
        return ApiError(503, f"The engine stopped working ({error}); the server must be restarted.", code="engine_dead")
    logger.error("Unexpected error.", exc_info=error)
    return ApiError(500, "The server made a mistake; its log says more.", code="internal_error")


def _from_validation(error: RequestValidationError) -> ApiError:
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        return invalid(f"The request body is not valid JSON: {errors[0]['ctx']['error']}", None, "invalid_json")
    # of the branches of a union those that got farthest say best what is wrong
    paths = [_path(entry, error.body) for entry in errors]
    param = max(paths, key=lambda path: path.count("."))
    if not param and errors[0]["type"] != "value_error":
        return invalid(
            "The request body must be a JSON object, sent with Content-Type: application/json", None, "invalid_json"
        )
    messages = dict.fromkeys(
        str(entry["msg"]).removeprefix("Value error, ") for entry, path in zip(errors, paths, strict=True) if path == param
    )
    return invalid(f"{param or 'the request'}: {', or: '.join(messages)}", param or None)


def _path(error: Mapping[str, Any], body: Any) -> str:
    """`messages.0.content`: without "body", and without pydantic's names for the branches of a union."""
    source, *location = error["loc"]
    parts = _within(location, body) if source == "body" else location
    if error["type"] == "missing":
        parts += location[-1:]
    return ".".join(map(str, parts))


def _within(location: Sequence[str | int], value: Any) -> list[str | int]:
    """Those parts of a location that lead into the value, as far as possible. A branch may have the name of a field."""
    if not location:
        return []
    part, *rest = location
    found = _within(rest, value)
    if part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int):
        found = max(found, [part, *_within(rest, value[part])], key=len)
    return found


def error_response(path: str, error: ApiError) -> JSONResponse:
    """In the form of the API that the path belongs to."""
    if f"{path.removeprefix('/v1')}/".startswith("/messages/"):
        status = _ANTHROPIC_OVERLOADED if error.code == "queue_full" else error.status
        return JSONResponse(anthropic_body(error), status_code=status, headers=error.headers)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


def add_error_handlers(app: FastAPI) -> None:
    def respond(request: Request, error: ApiError) -> JSONResponse:
        return error_response(request.url.path, error)

    @app.exception_handler(RequestValidationError)
    def on_validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(request, _from_validation(error))

    @app.exception_handler(HTTPException)
    def on_http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers) if error.headers else None
        code = _CODES.get(error.status_code)
        return respond(request, ApiError(error.status_code, message, code=code, headers=headers))

    # named one by one: for a plain Exception starlette logs a traceback as well
    @app.exception_handler(QueueFullError)
    @app.exception_handler(EngineDeadError)
    @app.exception_handler(ApiError)
    @app.exception_handler(Exception)
    def on_error(request: Request, error: Exception) -> JSONResponse:
        return respond(request, as_api_error(error))
