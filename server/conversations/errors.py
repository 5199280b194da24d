"""What the store raises. Messages never quote a message, a key or an id."""

from __future__ import annotations


class StoreError(Exception):
    """Anything the store raises on purpose."""


class StoreUnavailable(StoreError):
    """The database cannot be used now: down, full, locked or read-only. The same call may succeed later."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the conversation store is unavailable ({reason})")
        self.reason = reason


class SchemaMismatch(StoreError):
    """The database was made by an older or newer version of this software; the message says what to run."""


class NotFound(StoreError):
    """No such conversation, response or item for this owner: unknown, foreign, expired and deleted are the same."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"no such {kind}")
        self.kind = kind


class ConversationBusy(StoreError):
    """Another turn of the conversation, or the same idempotent request, is still running. `waited` is in seconds."""

    def __init__(self, waited: float) -> None:
        super().__init__(f"another request on this conversation is still running; waited {waited:.1f} s for it")
        self.waited = waited


class IdempotencyMismatch(StoreError):
    """The idempotency key was used before, with another request."""


class TurnLost(StoreError):
    """The turn is no longer this process's to end: it was deleted, or its lease ran out and it was ended without us."""


class Conflict(StoreError):
    """Two transactions wanted the same place; one of them has it. The store handles it by trying again."""
