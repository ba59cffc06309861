"""Every error leaves in OpenAI's form: {"error": {"message", "type", "param", "code"}}. Built here and nowhere else."""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from simple_flashinfer.engine.async_engine import QueueFullError
from simple_flashinfer.types import EngineDeadError

logger = logging.getLogger(__name__)

_RETRY_AFTER_SECONDS = "1"
_UNION_BRANCHES = {"str", "int"}  # pydantic's names for them in the path of an error


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
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}}


def _type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status >= 500:
        return "server_error" if status != 503 else "service_unavailable_error"
    return "invalid_request_error"


def invalid(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


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
    # of the branches of a union the one that got farthest says best what is wrong
    first = max(error.errors(), key=lambda entry: len(entry["loc"]))
    if first["type"] == "json_invalid":
        return invalid(f"The request body is not valid JSON: {first['ctx']['error']}", None, "invalid_json")
    path = [str(part) for part in first["loc"][1:] if str(part).isalnum() or "_" in str(part)]
    path = [part for part in path if part not in _UNION_BRANCHES]
    param = ".".join(path) or None
    message = str(first["msg"]).removeprefix("Value error, ")
    return invalid(f"{param}: {message}" if param else f"The request body: {message}", param)


def add_error_handlers(app: FastAPI) -> None:
    def respond(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, status_code=error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    def on_validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(_from_validation(error))

    @app.exception_handler(HTTPException)
    def on_http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers) if error.headers else None
        return respond(
            ApiError(error.status_code, message, code="not_found" if error.status_code == 404 else None, headers=headers)
        )

    @app.exception_handler(Exception)
    @app.exception_handler(ApiError)
    def on_error(request: Request, error: Exception) -> JSONResponse:
        return respond(as_api_error(error))
