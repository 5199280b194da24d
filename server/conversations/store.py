"""The conversation store: everything the HTTP routes need, in transactions that last.

An owner is the name of the API key that called. Ids of somebody else's things are as unknown as ids of nothing.
Every method raises StoreUnavailable while the database is in trouble, and works again when it is back.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal, Self

from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from server.conversations import export, retention, rows, turns
from server.conversations.database import Database
from server.conversations.errors import Conflict, SchemaMismatch, StoreError, StoreUnavailable
from server.conversations.keeper import Keeper
from server.conversations.tables import ConversationRow, ItemRow, TurnRow
from server.conversations.transactions import Transactions
from server.conversations.values import (
    Conversation,
    Idempotency,
    Item,
    Message,
    Order,
    Page,
    RunningTurn,
    Turn,
    Usage,
    checked_metadata,
    new_id,
)

log = logging.getLogger(__name__)

WAIT_SECONDS = 5.0


class Store:
    """One database of conversations, shared by any number of processes. Use `open` and `close`, or `async with`."""

    def __init__(
        self,
        url: str,
        *,
        conversation_ttl: float | None = None,
        lease_seconds: float = 15.0,
        checkpoint_seconds: float = 1.0,
    ) -> None:
        """`url` as `database.async_url` takes it (raises ValueError).

        `conversation_ttl`: seconds after its last turn began that any conversation is kept, or None for ever.
        `lease_seconds`: how long a dead process's turn keeps its conversation busy.
        `checkpoint_seconds`: how often the text streamed so far is saved.
        """
        self.database = Database(url)
        self.ttl = conversation_ttl
        self._keeper = Keeper(self.database, conversation_ttl, lease_seconds, checkpoint_seconds)
        self._run = Transactions(self.database, self._keeper)

    async def open(self) -> None:
        """Check the schema, create it in an empty database, and begin the background work.

        Raises SchemaMismatch, with the command that fixes it. Raises StoreUnavailable when the database does not
        answer: the store may be kept then, it checks again by itself and works once the database is back.
        """
        try:
            await self._keeper.check()
        except StoreUnavailable:
            self._keeper.start()
            raise
        except SchemaMismatch:
            await self.database.dispose()
            raise
        self._keeper.start()

    async def close(self) -> None:
        """End this process's turns as incomplete and close all connections. Opening again is possible."""
        await self._run.finish()
        await self._keeper.stop()
        await self.database.dispose()

    async def __aenter__(self) -> Self:
        try:
            await self.open()
        except StoreUnavailable:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # Conversations

    async def create_conversation(
        self,
        owner: str,
        *,
        metadata: Mapping[str, str] | None = None,
        items: Sequence[Message] = (),
        ttl: float | None = None,
        idempotency: Idempotency | None = None,
    ) -> Conversation:
        """A new conversation, kept `ttl` seconds after its last turn began, never longer than the store's own limit.

        Raises IdempotencyMismatch, and ValueError for metadata over OpenAI's limits.
        """
        labels = checked_metadata(metadata)

        async def create(session: AsyncSession, now: float) -> Conversation:
            known = await turns.recall(session, owner, idempotency)
            if known is not None and known.conversation_number is not None:
                return rows.conversation_value(
                    await session.get_one(ConversationRow, known.conversation_number), self.ttl
                )
            row = ConversationRow(id=new_id("conv"), owner=owner, labels=labels, created_at=now, active_at=now, ttl=ttl)
            row.expires_at = None if ttl is None else now + ttl
            session.add(row)
            await session.flush()
            if items:
                await turns.add(session, row, items, now)
            await turns.remember(session, owner, idempotency, now, conversation_number=row.number)
            return rows.conversation_value(row, self.ttl)

        try:
            return await self._run.write(create)
        except Conflict:
            # The same key at the same time: the other one is committed now.
            return await self._run.write(create)

    async def get_conversation(self, owner: str, conversation_id: str) -> Conversation:
        """Raises NotFound."""
        async with self._run.read() as (session, now):
            row = await rows.find_conversation(session, owner, conversation_id, now, self.ttl)
            return rows.conversation_value(row, self.ttl)

    async def update_conversation(self, owner: str, conversation_id: str, metadata: Mapping[str, str]) -> Conversation:
        """Replace the metadata. Raises NotFound, ValueError for metadata over OpenAI's limits."""
        labels = checked_metadata(metadata)

        async def change(session: AsyncSession, now: float) -> Conversation:
            row = await rows.find_conversation(session, owner, conversation_id, now, self.ttl, lock=True)
            row.labels = labels
            return rows.conversation_value(row, self.ttl)

        return await self._run.write(change)

    async def delete_conversation(self, owner: str, conversation_id: str) -> None:
        """Delete a conversation with all its turns; one that is running ends in TurnLost. Raises NotFound."""

        async def remove(session: AsyncSession, now: float) -> None:
            row = await rows.find_conversation(session, owner, conversation_id, now, self.ttl, lock=True)
            await session.execute(delete(ConversationRow).where(ConversationRow.number == row.number))

        await self._run.write(remove)
        self._keeper.unscrubbed = True

    # Items

    async def add_items(
        self,
        owner: str,
        conversation_id: str,
        items: Sequence[Message],
        *,
        idempotency: Idempotency | None = None,
        wait: float = WAIT_SECONDS,
    ) -> tuple[Item, ...]:
        """Append messages, after waiting up to `wait` seconds for a running turn.

        Raises NotFound, ConversationBusy, IdempotencyMismatch.
        """

        async def attempt(session: AsyncSession, now: float) -> tuple[Item, ...] | None:
            conversation = await rows.find_conversation(session, owner, conversation_id, now, self.ttl, lock=True)
            known = await turns.recall(session, owner, idempotency)
            if known is not None and known.turn_number is not None:
                return (await rows.load_turn(session, known.turn_number)).inputs
            if await turns.is_claimed(session, conversation.number, now):
                return None
            row = await turns.add(session, conversation, items, now)
            await turns.remember(session, owner, idempotency, now, turn_number=row.number)
            return (await rows.load_turn(session, row.number)).inputs

        added, _ = await self._run.patiently(lambda: self._run.write(attempt), wait)
        return added

    async def list_items(
        self, owner: str, conversation_id: str, *, after: str | None = None, limit: int = 20, order: Order = "desc"
    ) -> Page:
        """Items of ended turns, `limit` at a time, beginning after the item `after`. Raises NotFound for either id."""
        async with self._run.read() as (session, now):
            row = await rows.find_conversation(session, owner, conversation_id, now, self.ttl)
            return await rows.load_page(session, rows.items_of(row.number), after, limit, order)

    async def get_item(self, owner: str, conversation_id: str, item_id: str) -> Item:
        """Raises NotFound."""
        async with self._run.read() as (session, now):
            row = await rows.find_conversation(session, owner, conversation_id, now, self.ttl)
            return rows.item_value(*await rows.find_item(session, rows.items_of(row.number), item_id))

    async def delete_item(self, owner: str, conversation_id: str, item_id: str) -> Conversation:
        """Delete one item and return its conversation. Raises NotFound."""

        async def remove(session: AsyncSession, now: float) -> Conversation:
            row = await rows.find_conversation(session, owner, conversation_id, now, self.ttl, lock=True)
            item, _ = await rows.find_item(session, rows.items_of(row.number), item_id)
            await session.execute(delete(ItemRow).where(ItemRow.number == item.number))
            return rows.conversation_value(row, self.ttl)

        conversation = await self._run.write(remove)
        self._keeper.unscrubbed = True
        return conversation

    # Turns

    async def begin_turn(
        self,
        owner: str,
        messages: Sequence[Message],
        *,
        conversation_id: str | None = None,
        previous_response_id: str | None = None,
        metadata: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
        idempotency: Idempotency | None = None,
        wait: float = WAIT_SECONDS,
    ) -> RunningTurn | Turn:
        """Claim the conversation and store the input. A Turn comes back when the same request was answered before.

        Waits up to `wait` seconds for a running turn of the conversation, or for the same request. Every RunningTurn
        must go to `finish_turn`, `interrupt_turn` or `fail_turn`. `details` is whatever JSON the caller wants back with
        the turn. Raises NotFound, ConversationBusy, IdempotencyMismatch, and ValueError for metadata.
        """
        if conversation_id is not None and previous_response_id is not None:
            raise ValueError("a turn follows a conversation or a response, not both")
        request = turns.Request(
            owner,
            tuple(messages),
            conversation_id,
            previous_response_id,
            checked_metadata(metadata),
            dict(details or {}),
            idempotency,
        )

        async def attempt(session: AsyncSession, now: float) -> RunningTurn | Turn | None:
            return await turns.begin(session, request, now, self.ttl, self._keeper.lease)

        begun: RunningTurn | Turn
        begun, waited = await self._run.patiently(lambda: self._run.begin(attempt), wait)
        if isinstance(begun, RunningTurn):
            begun.waited = waited
        return begun

    async def finish_turn(
        self,
        turn: RunningTurn,
        text: str,
        *,
        status: Literal["complete", "incomplete"] = "complete",
        usage: Usage | None = None,
    ) -> Turn:
        """Commit the whole reply; when this returns, it lasts. `incomplete` is for a reply cut by its token limit.

        Raises TurnLost when the turn was deleted or ended without us: do not tell the client that it is complete.
        """

        async def finish(session: AsyncSession, now: float) -> Turn:
            await turns.end(session, turn, status, now, text=text, usage=usage)
            return turn.ended(status, text, usage, now)

        ended = await self._run.write(finish)
        self._keeper.forget(turn)
        return ended

    async def interrupt_turn(self, turn: RunningTurn) -> None:
        """End a turn whose stream broke, as incomplete with the text in `turn.sent_text`.

        Never fails: without a database it is written as soon as there is one, and a turn that is over is left alone.
        """
        self._keeper.owed.add(turn)
        try:
            await self._run.uncancelled(self._keeper.interrupt(turn))
        except StoreError as error:
            log.warning("an interrupted turn will be written later: %s", error)

    async def fail_turn(self, turn: RunningTurn) -> None:
        """End a turn of which nothing was sent: it can be retrieved, but is no part of the conversation.

        Raises TurnLost.
        """
        await self._run.write(lambda session, now: turns.end(session, turn, "failed", now))
        self._keeper.forget(turn)

    async def get_turn(self, owner: str, response_id: str) -> Turn:
        """An ended turn by its response. Raises NotFound, also while it runs."""
        async with self._run.read() as (session, now):
            row = await rows.find_turn(session, owner, response_id, now, self.ttl)
            return await rows.load_turn(session, row.number)

    async def get_chain(self, owner: str, response_id: str) -> tuple[Turn, ...]:
        """The ended turns that lead to a response, itself included, oldest first. Raises NotFound."""
        async with self._run.read() as (session, now):
            row = await rows.find_turn(session, owner, response_id, now, self.ttl)
            return await rows.load_turns(session, rows.turns_up_to(row.number))

    async def list_input_items(
        self, owner: str, response_id: str, *, after: str | None = None, limit: int = 20, order: Order = "desc"
    ) -> Page:
        """The items a response was asked with, without earlier turns. Raises NotFound for either id."""
        async with self._run.read() as (session, now):
            row = await rows.find_turn(session, owner, response_id, now, self.ttl)
            return await rows.load_page(session, rows.inputs_of(row.number), after, limit, order)

    async def delete_turn(self, owner: str, response_id: str) -> None:
        """Delete a response with its items; later turns follow the one before it. Raises NotFound."""

        async def remove(session: AsyncSession, now: float) -> None:
            await turns.drop(session, await rows.find_turn(session, owner, response_id, now, self.ttl))

        await self._run.write(remove)
        self._keeper.unscrubbed = True

    # All owners: for the command line

    async def purge(self, older_than: float | None = None) -> retention.Purged:
        """Delete what has expired, and what had no turn for `older_than` seconds; rewrite the store without it."""
        await self._keeper.check()
        limits = [limit for limit in (self.ttl, older_than) if limit is not None]
        purged = await retention.delete_expired(self.database, min(limits, default=None))
        patient = Database(self.database.given_url, patient=True)
        try:
            await retention.compact(patient)
        finally:
            await patient.dispose()
        return purged

    async def export(self) -> AsyncIterator[dict[str, Any]]:
        """Vicuna records of all conversations; see `export.to_record`."""
        await self._keeper.check()
        async for record in export.records(self.database, self.ttl):
            yield record

    async def count(self) -> dict[str, int]:
        """How many conversations there are, and turns by status."""
        async with self._run.read() as (session, _):
            conversations = await session.scalar(select(func.count()).select_from(ConversationRow)) or 0
            found = await session.execute(select(TurnRow.status, func.count()).group_by(TurnRow.status))
            statuses: dict[str, int] = {row[0]: row[1] for row in found}
        names = ("complete", "incomplete", "failed", "in_progress")
        return {"conversations": conversations, **{name: statuses.get(name, 0) for name in names}}
