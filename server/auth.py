"""Who may call: API keys as bearer tokens, checked on each route by dependency."""

from __future__ import annotations

from fastapi import Request

from server.errors import ApiError
from server.settings import ApiKey

ANONYMOUS = "anonymous"


def identify(keys: tuple[ApiKey, ...], authorization: str | None) -> str | None:
    """The name of the key in an Authorization header, or None. Every key is compared, whichever matches."""
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer":
        token = ""
    found = None
    for key in keys:
        if key.matches(token):
            found = key.name
    return found


async def require_key(request: Request) -> str:
    """FastAPI dependency: the caller's key name; `anonymous` when the service has no keys. Raises ApiError 401."""
    keys: tuple[ApiKey, ...] = request.app.state.keys
    if not keys:
        return ANONYMOUS
    name = identify(keys, request.headers.get("authorization"))
    if name is None:
        raise ApiError(
            401,
            "A valid API key is needed: send the header Authorization: Bearer YOUR_KEY.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return name
