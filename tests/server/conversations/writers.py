"""What `test_store_kill` kills: a process whose eight writers talk through the real store and say what it confirmed."""

from __future__ import annotations

import asyncio
import hashlib
import os
from multiprocessing.connection import Connection

from server.conversations.errors import ConversationBusy, StoreUnavailable, TurnLost
from server.conversations.store import Store
from server.conversations.values import Idempotency, Message, Turn

OWNER = "writers"
LEASE_SECONDS = 0.3


def answer_to(question: str) -> str:
    """A long reply that shows when a part of it is missing or of another one's."""
    return " ".join(hashlib.sha256(f"{question} {n}".encode()).hexdigest() for n in range(30))


def work(url: str, conversations: list[str], begun: list[int], pipe: Connection) -> None:
    """Talk for ever: writer n begins with its turn number `begun[n]`, and reports (n, turn, status) once it is kept."""
    # Not the parent's terminal: a kill is not worth a word.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    asyncio.run(_work(url, conversations, begun, pipe))


async def _work(url: str, conversations: list[str], begun: list[int], pipe: Connection) -> None:
    async with Store(url, lease_seconds=LEASE_SECONDS, checkpoint_seconds=0.02) as store:
        await asyncio.gather(*(_write(store, n, name, begun[n], pipe) for n, name in enumerate(conversations)))


async def _write(store: Store, writer: int, conversation: str, number: int, pipe: Connection) -> None:
    while True:
        try:
            kept = await _turn(store, conversation, f"{writer}.{number}")
        except (ConversationBusy, StoreUnavailable, TurnLost):
            # On a machine that stands still for a moment, so short a lease may run out.
            continue
        pipe.send((writer, number, kept.status))
        number += 1


async def _turn(store: Store, conversation: str, question: str) -> Turn:
    key = Idempotency(question, question)
    messages = [Message("human", question)]
    turn = await store.begin_turn(OWNER, messages, conversation_id=conversation, idempotency=key)
    if isinstance(turn, Turn):
        return turn
    for word in answer_to(question).split(" "):
        turn.sent(word + " ")
        await asyncio.sleep(0.001)
    return await store.finish_turn(turn, answer_to(question))
