"""Stored conversations as Vicuna records, the JSON lines that `training` reads."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from server.conversations import rows
from server.conversations.database import Database
from server.conversations.tables import ConversationRow, TurnRow
from server.conversations.values import Message, Turn

BATCH = 100


async def records(database: Database, ttl: float | None) -> AsyncIterator[dict[str, Any]]:
    """Every kept conversation, then every chain of responses without one, in batches of short transactions."""
    async for record in _conversations(database, ttl):
        yield record
    async for record in _chains(database, ttl):
        yield record


async def _conversations(database: Database, ttl: float | None) -> AsyncIterator[dict[str, Any]]:
    last = 0
    while True:
        async with database.read() as session:
            kept = rows.kept(await database.now(session), ttl)
            number = ConversationRow.number
            query = select(number, ConversationRow.id).where(number > last, kept).order_by(number).limit(BATCH)
            batch = (await session.execute(query)).all()
            found = [(name, await rows.load_turns(session, rows.turns_of(number))) for number, name in batch]
        for name, turns in found:
            if record := to_record(name, turns):
                yield record
        if not batch:
            return
        last = batch[-1][0]


async def _chains(database: Database, ttl: float | None) -> AsyncIterator[dict[str, Any]]:
    last = 0
    while True:
        async with database.read() as session:
            batch = await _chain_ends(session, await database.now(session), ttl, last)
            found = [(name, await rows.load_turns(session, rows.turns_up_to(number))) for number, name in batch]
        for name, turns in found:
            if record := to_record(name, turns):
                yield record
        if not batch:
            return
        last = batch[-1][0]


async def _chain_ends(session: AsyncSession, now: float, ttl: float | None, last: int) -> list[tuple[int, str]]:
    """Responses without a conversation that none follows: each is the end of one chain."""
    follower = aliased(TurnRow)
    query = (
        select(TurnRow.number, TurnRow.response_id)
        .where(TurnRow.number > last, TurnRow.conversation_number.is_(None), rows.kept_turn(now, ttl))
        .where(~select(follower.number).where(follower.previous_number == TurnRow.number).exists())
        .order_by(TurnRow.number)
        .limit(BATCH)
    )
    return [(number, name or "") for number, name in await session.execute(query)]


def to_record(name: str, turns: Iterable[Turn]) -> dict[str, Any] | None:
    """Turns as one record that alternates between human and gpt, or None when no exchange is left.

    Incomplete turns are left out whole, so that nobody learns to stop in the middle. Messages of one speaker in a row
    become one, a blank line between them; system messages count at the beginning only.
    """
    joined: list[dict[str, str]] = []
    for message in _messages(turn for turn in turns if turn.status == "complete"):
        if joined and joined[-1]["from"] == message.speaker:
            joined[-1]["value"] += "\n\n" + message.value
        elif message.speaker == "human" or (joined and message.speaker == "gpt" and joined[-1]["from"] == "human"):
            joined.append({"from": message.speaker, "value": message.value})
        elif message.speaker == "system" and not joined:
            joined.append({"from": "system", "value": message.value})
    if joined and joined[-1]["from"] != "gpt":
        joined.pop()
    return {"id": name, "conversations": joined} if any(turn["from"] == "gpt" for turn in joined) else None


def _messages(turns: Iterable[Turn]) -> Iterable[Message]:
    for turn in turns:
        items = (*turn.inputs, *([turn.reply] if turn.reply else []))
        yield from (Message(item.speaker, item.value) for item in items if item.value.strip())
