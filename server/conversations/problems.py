"""What the store raises, as errors for clients. Messages name no id, no key and nothing people wrote."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from server.conversations.errors import (
    ConversationBusy,
    IdempotencyMismatch,
    NotFound,
    SchemaMismatch,
    StoreError,
    StoreUnavailable,
    TurnLost,
)
from server.errors import ApiError, respond, unavailable

RETRY_SECONDS = 5


def problem(error: StoreError) -> ApiError:
    """The status and message for `error`."""
    if isinstance(error, NotFound):
        return ApiError(404, f"There is no such {error.kind}.", code="not_found")
    if isinstance(error, ConversationBusy):
        return _busy(error)
    if isinstance(error, IdempotencyMismatch):
        return ApiError(422, "This Idempotency-Key came with another request before.", code="idempotency_key_reused")
    if isinstance(error, TurnLost):
        return ApiError(409, "The turn was deleted, or ended without us, while it ran.", code="turn_lost")
    if isinstance(error, StoreUnavailable):
        return unavailable(
            "Conversations cannot be reached now; chat completions without one go on.",
            retry_after=RETRY_SECONDS,
            code="store_unavailable",
        )
    if isinstance(error, SchemaMismatch):
        # Its own message names the database, which is the operator's business.
        return unavailable("The conversation store is another version's.", retry_after=60, code="store_schema")
    return ApiError(500, "The conversation store failed on this request.", code="store_error")


def _busy(error: ConversationBusy) -> ApiError:
    return ApiError(
        409,
        "Another request on this conversation, or with this Idempotency-Key, is still running; "
        f"waited {error.waited:.1f} s for it.",
        param="conversation",
        code="conversation_busy",
        headers={"Retry-After": "1"},
    )


async def _respond(_: Request, error: Exception) -> Response:
    assert isinstance(error, StoreError)
    found = problem(error)
    return respond(found.status_code, str(found.detail), found.param, found.code, found.headers)


def install(app: FastAPI) -> None:
    """Answer the store's errors on every route of `app`."""
    app.add_exception_handler(StoreError, _respond)
