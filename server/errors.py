"""Every error this service answers with, in OpenAI's envelope. Messages never repeat what the user sent."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

log = logging.getLogger(__name__)

TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}


class ApiError(HTTPException):
    """An error with a status, a message for people, and the parameter and code that programs look at."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers=dict(headers) if headers else None)
        self.param = param
        self.code = code


def unavailable(message: str, *, retry_after: int, code: str) -> ApiError:
    """503 with Retry-After, in seconds."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(retry_after)})


def envelope(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error body."""
    kind = TYPES.get(HTTPStatus(status), "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def respond(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(envelope(status, message, param, code), status, headers=dict(headers) if headers else None)


def describe(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """Validation errors to (message, parameter): where and why, never the value that was sent."""
    if not errors:
        return "The request is invalid.", None
    first = errors[0]
    # Union branches and validator names are pydantic's business: a client knows its own field names and indexes only.
    path = [str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier()]
    path = [part for part in path if part != "body"]
    cause = (first.get("ctx") or {}).get("error")
    reason = str(cause) if cause is not None else str(first["msg"])
    param = getattr(cause, "parameter", None) or (path[0] if path else None)
    where = ".".join(path[:4]) or param
    return (f"{where}: {reason}" if where else reason), param


async def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, StarletteHTTPException)
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    return respond(error.status_code, str(error.detail), param, code, error.headers)


async def _validation(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    message, param = describe(error.errors())
    return respond(400, message, param, "invalid_value")


async def _unexpected(_: Request, error: Exception) -> JSONResponse:
    # The exception's own text may quote the prompt, so only its type is logged.
    log.error("unexpected %s while answering a request", type(error).__name__)
    return respond(500, "The service failed on this request. It has been logged.", code="internal_error")


def install(app: FastAPI) -> None:
    """Answer every error of `app` in OpenAI's envelope."""
    app.add_exception_handler(StarletteHTTPException, _http)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(Exception, _unexpected)
