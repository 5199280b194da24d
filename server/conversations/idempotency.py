"""The Idempotency-Key header: a request that is sent again leads to the first one's result."""

from __future__ import annotations

import hashlib

from fastapi import Request

from server.conversations.values import Idempotency
from server.errors import ApiError

MAX_KEY = 255


async def idempotency(request: Request) -> Idempotency | None:
    """FastAPI dependency: the key and what it was sent with; None without one. Raises ApiError 400."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not 0 < len(key) <= MAX_KEY:
        raise ApiError(400, f"An Idempotency-Key has 1 to {MAX_KEY} characters.", code="invalid_idempotency_key")
    sent = f"{request.method} {request.url.path}\n".encode() + await request.body()
    return Idempotency(key, hashlib.sha256(sent).hexdigest())
