"""The store's one background task: renews leases, saves streamed text, settles what died, deletes what expired."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref

from server.conversations import retention, schema, turns
from server.conversations.database import Database
from server.conversations.errors import StoreError, TurnLost
from server.conversations.values import RunningTurn

log = logging.getLogger(__name__)

EXPIRY_SECONDS = 60.0


class Keeper:
    """Looks after the turns that this process runs.

    Streamed text is saved once a second for all turns together, in one transaction: a kill loses at most the last
    second of an unfinished reply, and the cost does not grow with tokens. What is saved was sent before it was saved,
    so an incomplete turn never claims text that nobody got.
    """

    def __init__(self, database: Database, ttl: float | None, lease: float, interval: float) -> None:
        self.database, self.ttl, self.lease, self.interval = database, ttl, lease, interval
        self.ready = False
        self.running: weakref.WeakSet[RunningTurn] = weakref.WeakSet()
        # Interrupted turns that could not be written while the database was away.
        self.owed: set[RunningTurn] = set()
        self.unscrubbed = False
        self._expire_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._complaint = ""

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="conversation keeper")

    async def stop(self) -> None:
        """Stop the task and write what is owed, if the database lets us."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self.owed.update(self.running)
        if self.ready:
            await self._attempt()

    async def check(self) -> None:
        """Prepare the schema once. Raises SchemaMismatch, StoreUnavailable."""
        if not self.ready:
            await schema.prepare(self.database)
            self.ready = True

    def watch(self, turn: RunningTurn) -> None:
        """Renew `turn` until `forget`, or until its handle is gone."""
        turn.renew_at = time.monotonic() + self.lease / 3
        self.running.add(turn)

    def forget(self, turn: RunningTurn) -> None:
        self.running.discard(turn)
        self.owed.discard(turn)

    async def interrupt(self, turn: RunningTurn) -> None:
        """End `turn` as incomplete with what was sent; one that is no longer ours is left alone."""
        try:
            async with self.database.write() as session:
                now = await self.database.now(session)
                await turns.end(session, turn, "incomplete", now, text=turn.sent_text)
        except TurnLost:
            pass
        self.forget(turn)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self.interval)
            await self._attempt()

    async def _attempt(self) -> None:
        try:
            await self._beat()
            self._complaint = ""
        except StoreError as error:
            # Once per trouble, not once per second.
            if str(error) != self._complaint:
                log.warning("conversation keeper: %s", error)
                self._complaint = str(error)
        except Exception as error:
            log.error("conversation keeper: unexpected %s", type(error).__name__)

    async def _beat(self) -> None:
        await self.check()
        for turn in list(self.owed):
            await self.interrupt(turn)
        await self._save()
        async with self.database.write() as session:
            await turns.settle(session, await self.database.now(session))
        if time.monotonic() >= self._expire_at:
            await self._expire()
        if self.unscrubbed:
            self.unscrubbed = not await retention.scrub(self.database)

    async def _save(self) -> None:
        now = time.monotonic()
        due = [turn for turn in self.running if len(turn.pieces) > turn.saved_pieces or now >= turn.renew_at]
        if not due:
            return
        async with self.database.write() as session:
            await turns.save(session, due, await self.database.now(session), self.lease)
        for turn in due:
            turn.renew_at = now + self.lease / 3

    async def _expire(self) -> None:
        purged = await retention.delete_expired(self.database, self.ttl)
        self._expire_at = time.monotonic() + EXPIRY_SECONDS
        if any(purged):
            self.unscrubbed = True
            log.info("%d conversations and %d responses outlived their time and were deleted", *purged)
