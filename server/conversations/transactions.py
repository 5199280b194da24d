"""How the store runs its work: reads, writes that a cancelled request cannot tear, waiting for a busy conversation."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from server.conversations import turns
from server.conversations.database import Database
from server.conversations.errors import Conflict, ConversationBusy
from server.conversations.keeper import Keeper
from server.conversations.values import RunningTurn, Turn

T = TypeVar("T")
Work = Callable[[AsyncSession, float], Awaitable[T]]
"""Something to do in a transaction, given the time by the database's clock."""

POLL_SECONDS = 0.05


class Transactions:
    """Runs work in transactions, after the schema was found right."""

    def __init__(self, database: Database, keeper: Keeper) -> None:
        self.database, self.keeper = database, keeper
        self._tasks: set[asyncio.Task[Any]] = set()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[tuple[AsyncSession, float]]:
        """A transaction for reading, and the time."""
        await self.keeper.check()
        async with self.database.read() as session:
            yield session, await self.database.now(session)

    async def write(self, work: Work[T]) -> T:
        """Do `work` and commit it, even when the caller is cancelled meanwhile."""
        return await self.uncancelled(self._commit(work))

    async def _commit(self, work: Work[T]) -> T:
        await self.keeper.check()
        async with self.database.write() as session:
            return await work(session, await self.database.now(session))

    async def uncancelled(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work` in a task of its own. Servers cancel a request again at every await once its client is gone."""
        return await asyncio.shield(self._start(work))

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Whoever waited may be gone: a turn that was interrupted meanwhile is no news to anyone then.
            task.exception()

    async def begin(self, work: Work[RunningTurn | Turn | None]) -> RunningTurn | Turn | None:
        """Begin a turn, and look after it from then on. If the caller is cancelled meanwhile, it leaves no trace."""
        task = self._start(self._commit(work))
        try:
            begun = await asyncio.shield(task)
        except asyncio.CancelledError:
            self._start(self._undo(task))
            raise
        if isinstance(begun, RunningTurn):
            self.keeper.watch(begun)
        return begun

    async def _undo(self, task: asyncio.Task[RunningTurn | Turn | None]) -> None:
        (begun,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(begun, RunningTurn):
            turn = begun
            await self._commit(lambda session, now: turns.end(session, turn, "failed", now))

    async def patiently(self, attempt: Callable[[], Awaitable[T | None]], wait: float) -> tuple[T, float]:
        """Attempt until something comes back; also the seconds waited. Raises ConversationBusy after `wait` seconds."""
        loop = asyncio.get_running_loop()
        began, waited = loop.time(), 0.0
        while True:
            try:
                result = await attempt()
            except Conflict:
                result = None
            if result is not None:
                return result, waited
            if waited >= wait:
                raise ConversationBusy(waited)
            pause = POLL_SECONDS * random.uniform(0.5, 1.5)
            await asyncio.sleep(min(pause, max(wait - waited, 0.0)))
            waited = loop.time() - began

    async def finish(self) -> None:
        """Wait for writes that are still under way."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
