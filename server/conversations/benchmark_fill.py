"""A store with many conversations, written in bulk."""

from __future__ import annotations

import time

from sqlalchemy import insert

from server.conversations.store import Store
from server.conversations.tables import ConversationRow, ItemRow, TurnRow
from server.conversations.values import new_id

BATCH = 2000
TURNS = 2
TEXT = "What could cause a dry cough at night, and when should somebody who has one see a doctor? " * 3


async def fill(url: str, conversations: int, owner: str = "anonymous") -> None:
    """Store `conversations` conversations of two turns each in an empty store."""
    async with Store(url) as store:
        for first in range(1, conversations + 1, BATCH):
            numbers = range(first, min(first + BATCH, conversations + 1))
            async with store.database.write() as session:
                await session.execute(insert(ConversationRow), [_conversation(n, owner) for n in numbers])
                turns = [_turn(n, t, owner) for n in numbers for t in range(TURNS)]
                await session.execute(insert(TurnRow), turns)
                await session.execute(insert(ItemRow), [item for turn in turns for item in _items(turn["number"])])


def _conversation(number: int, owner: str) -> dict[str, object]:
    now = time.time()
    return {
        "number": number,
        "id": new_id("conv"),
        "owner": owner,
        "labels": {},
        "created_at": now,
        "active_at": now,
    }


def _turn(conversation: int, place: int, owner: str) -> dict[str, int | object]:
    now = time.time()
    number = (conversation - 1) * TURNS + place + 1
    return {
        "number": number,
        "owner": owner,
        "response_id": new_id("resp"),
        "conversation_number": conversation,
        "previous_number": number - 1 if place else None,
        "status": "complete",
        "language": "en",
        "created_at": now,
        "ended_at": now,
        "labels": {},
        "details": {},
    }


def _items(turn: object) -> list[dict[str, object]]:
    return [
        {"turn_number": turn, "id": new_id("msg"), "speaker": speaker, "value": TEXT, "is_reply": speaker == "gpt"}
        for speaker in ("human", "gpt")
    ]
