"""Who may call: API keys and admin keys as bearer tokens, checked on each route by dependency."""

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


async def require_admin(request: Request) -> str:
    """FastAPI dependency: the administrator's key name. Raises ApiError 404 where there is none, 401 for any other."""
    keys: tuple[ApiKey, ...] = request.app.state.administrators
    if not keys:
        raise ApiError(404, "This service was started without admin keys, so /admin is off.", code="admin_off")
    return _identified(keys, request, "A valid admin key is needed: API keys do not work here.")


async def require_key(request: Request) -> str:
    """FastAPI dependency: the caller's key name; `anonymous` when the service has no keys. Raises ApiError 401."""
    keys: tuple[ApiKey, ...] = request.app.state.keys
    if not keys:
        return ANONYMOUS
    return _identified(keys, request, "A valid API key is needed: send the header Authorization: Bearer YOUR_KEY.")


def _identified(keys: tuple[ApiKey, ...], request: Request, message: str) -> str:
    name = identify(keys, request.headers.get("authorization"))
    if name is None:
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
    return name
