"""What a request body may be before anything looks inside: size, encoding, JSON and its depth."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from server.conversations.errors import StoreError
from server.engine_serving import as_api_error
from server.errors import ApiError

MAX_DEPTH = 64
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
BRACKETS_OUTSIDE_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"|([\[{])|([\]}])', re.DOTALL)


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(400, f"The body is not valid JSON: {name} is not a JSON number.", code="invalid_json")


def depth(body: bytes) -> int:
    """How deeply arrays and objects nest in `body`, found without recursion; stops counting past MAX_DEPTH."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return 0
    level = deepest = 0
    for match in BRACKETS_OUTSIDE_STRINGS.finditer(body):
        if match[1]:
            level += 1
            deepest = max(deepest, level)
            if deepest > MAX_DEPTH:
                break
        elif match[2]:
            level -= 1
    return deepest


def parse_json(body: bytes) -> Any:
    """`body` as JSON. Raises ApiError 400 for anything else: bad UTF-8, NaN, lone surrogates, deep nesting."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise ApiError(400, "The body is not valid UTF-8.", code="invalid_encoding") from None
    if depth(body) > MAX_DEPTH:
        raise ApiError(400, f"The body nests deeper than {MAX_DEPTH} levels.", code="invalid_json")
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except ValueError as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise ApiError(400, f"The body is not valid JSON{where}.", code="invalid_json") from None
    # An escaped half of a surrogate pair is valid JSON but no text: no tokenizer can encode it.
    if "\\u" in text and LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise ApiError(400, "The body contains a lone surrogate, which is not text.", code="invalid_encoding")
    return value


class CheckedRequest(Request):
    """A request whose body is read within the limit and parsed strictly."""

    async def body(self) -> bytes:
        if hasattr(self, "_body"):
            return self._body
        limit: int = self.app.state.settings.max_body_bytes
        too_large = ApiError(413, f"The body is larger than {limit} bytes.", code="body_too_large")
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise too_large
        chunks, size = [], 0
        async for chunk in self.stream():
            size += len(chunk)
            if size > limit:
                raise too_large
            chunks.append(chunk)
        self._body = b"".join(chunks)
        return self._body

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = parse_json(await self.body())
        return self._json


class CheckedRoute(APIRoute):
    """A route that takes JSON only, and reads it as a CheckedRequest."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_checked(request: Request) -> Response:
            if request.method in {"POST", "PUT", "PATCH"}:
                media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if media_type != "application/json":
                    raise ApiError(
                        415, "Send the body as JSON, with Content-Type: application/json.", code="invalid_content_type"
                    )
            try:
                return await handle(CheckedRequest(request.scope, request.receive))
            except (HTTPException, RequestValidationError, StoreError):
                raise
            except Exception as error:
                raise as_api_error(error) from None

        return handle_checked
