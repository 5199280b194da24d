"""Keeping and forgetting: what has outlived its time is deleted, and what is deleted is overwritten."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from sqlalchemy import ColumnElement, CursorResult, and_, delete, not_, select, text
from sqlalchemy.orm import InstrumentedAttribute

from server.conversations import rows
from server.conversations.database import Database
from server.conversations.tables import ConversationRow, IdempotencyRow, TurnRow

KEY_SECONDS = 24 * 3600
"""How long an idempotency key is remembered."""
BATCH = 500
"""Rows a transaction deletes, so that writers wait milliseconds for it."""


class Purged(NamedTuple):
    """How many conversations, and responses without a conversation, were deleted."""

    conversations: int
    responses: int


async def delete_expired(database: Database, ttl: float | None) -> Purged:
    """Delete what has outlived its own time to live or the store's `ttl` (seconds), and old idempotency keys."""
    async with database.read() as session:
        now = await database.now(session)
    conversations = await _delete(database, ConversationRow.number, not_(rows.kept(now, ttl)))
    alone = TurnRow.conversation_number.is_(None)
    # A running turn is never old: its lease would have ended it.
    old = and_(alone, TurnRow.created_at <= now - ttl, TurnRow.status != "in_progress") if ttl is not None else None
    responses = 0 if old is None else await _delete(database, TurnRow.number, old)
    async with database.write() as session:
        await session.execute(delete(IdempotencyRow).where(IdempotencyRow.created_at <= now - KEY_SECONDS))
    return Purged(conversations, responses)


async def _delete(database: Database, number: InstrumentedAttribute[int], which: ColumnElement[bool]) -> int:
    total = 0
    while True:
        async with database.write() as session:
            batch = select(number).where(which).limit(BATCH)
            result = await session.execute(
                delete(number.class_).where(number.in_(batch)), execution_options={"synchronize_session": False}
            )
        deleted = cast(CursorResult[Any], result).rowcount
        total += deleted
        if deleted < BATCH:
            return total


async def scrub(database: Database) -> bool:
    """Overwrite SQLite's log of old pages, where deleted text still stands; False if a reader kept some of it.

    The pages themselves are overwritten as rows go (`secure_delete`). PostgreSQL's own autovacuum reuses the space.
    """
    if not database.is_sqlite:
        return True
    async with database.autocommit() as connection:
        busy, *_ = tuple((await connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")).one())
    return not busy


async def compact(database: Database) -> None:
    """Rewrite the whole store without deleted rows. Writers wait meanwhile; on PostgreSQL readers do too."""
    async with database.autocommit() as connection:
        if database.is_sqlite:
            await connection.exec_driver_sql("VACUUM")
        else:
            for table in ("conversations", "turns", "items", "idempotency_keys"):
                await connection.execute(text(f"VACUUM (FULL) {table}"))
    await scrub(database)
