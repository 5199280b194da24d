"""What the replicas of one database agree on: the checkpoint that is wanted, whose turn it is, and what was done."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sqlalchemy import CursorResult, delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from server.checkpoints.errors import CheckpointError
from server.checkpoints.tables import AdapterRow, AuditRow, DeploymentRow, ReplicaRow
from server.conversations import schema
from server.conversations.database import Database

BUSY_SECONDS = 30.0
"""How long the deployment stays taken by a replica that died; who lives renews it."""
ALIVE_SECONDS = 30.0
"""How old the heartbeat of a replica that lives may be."""
FORGET_SECONDS = 3600.0
TURN_SECONDS = 60.0
"""How long a replica that died keeps its turn; who lives renews it."""


class Busy(CheckpointError):
    """Someone else is changing the deployment."""


@dataclass(frozen=True)
class Wanted:
    """The deployment as it is wanted."""

    desired: str | None
    previous: str | None
    candidate: str | None
    share: float | None
    revision: int
    busy_who: str | None
    busy_what: str | None

    def target(self, canary: bool) -> str | None:
        """What a replica has to serve; None is what it was started with."""
        return self.candidate if canary and self.candidate else self.desired


@dataclass(frozen=True)
class Replica:
    """A process as it last said of itself. `age` is the seconds since then."""

    id: str
    checkpoint: str
    canary: bool
    state: str
    failed_revision: int | None
    message: str
    age: float

    @property
    def alive(self) -> bool:
        return self.age <= ALIVE_SECONDS


@dataclass(frozen=True)
class Place:
    """Where an adapter's content is. Without a `revision` it is whatever is found there."""

    directory: Path
    revision: str | None = None


def in_share(conversation_id: str, share: float) -> bool:
    """Whether a conversation is one of the canary's: always the same ones, and more of them as `share` grows."""
    digest = hashlib.sha256(conversation_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class Deployment:
    """Short transactions on their tables. All of them raise StoreUnavailable while the database is away."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self._checked = False

    async def _check(self) -> None:
        if not self._checked:
            await schema.prepare(self.database)
            self._checked = True

    @asynccontextmanager
    async def _read(self) -> AsyncIterator[tuple[AsyncSession, float]]:
        await self._check()
        async with self.database.read() as session:
            yield session, await self.database.now(session)

    @asynccontextmanager
    async def _write(self) -> AsyncIterator[tuple[AsyncSession, float]]:
        await self._check()
        async with self.database.write() as session:
            yield session, await self.database.now(session)

    async def wanted(self) -> Wanted:
        async with self._read() as (session, now):
            return _wanted(await session.get_one(DeploymentRow, 1), now)

    # Taking turns

    async def take(self, who: str, what: str) -> str:
        """Hold the deployment, to change it; the token to do so with. Raises Busy, naming who holds it."""
        async with self._write() as (session, now):
            row = await session.get_one(DeploymentRow, 1, with_for_update=True)
            if row.busy_until is not None and row.busy_until > now:
                raise Busy(f"{row.busy_who} is at it: {row.busy_what}")
            row.busy_who, row.busy_what = who, what
            row.busy_token, row.busy_until = secrets.token_hex(16), now + BUSY_SECONDS
            return row.busy_token

    async def keep(self, token: str) -> None:
        """Hold it for longer."""
        async with self._write() as (session, now):
            (await _held(session, token)).busy_until = now + BUSY_SECONDS

    async def release(self, token: str) -> None:
        """Let others change the deployment. Does nothing when they may already."""
        async with self._write() as (session, _):
            mine = update(DeploymentRow).where(DeploymentRow.busy_token == token)
            await session.execute(mine.values(busy_who=None, busy_what=None, busy_token=None, busy_until=None))

    # Changing what is wanted; each returns the new revision

    async def want(self, token: str, desired: str, previous: str | None) -> int:
        """All replicas are to serve `desired`; a canary is over."""
        return await self._change(token, desired=desired, previous=previous, candidate=None, share=None)

    async def want_canary(
        self, token: str, candidate: str, share: float, replicas: list[str], desired: str | None
    ) -> int:
        """`replicas` are to serve `candidate`, for a `share` of the conversations; the others `desired`."""
        return await self._change(token, replicas=replicas, candidate=candidate, share=share, desired=desired)

    async def end_canary(self, token: str) -> int:
        """All replicas are to serve what is desired."""
        return await self._change(token, candidate=None, share=None)

    async def _change(self, token: str, *, replicas: list[str] | None = None, **values: Any) -> int:
        async with self._write() as (session, now):
            row = await _held(session, token)
            for name, value in values.items():
                setattr(row, name, value)
            row.revision, row.changed_at = row.revision + 1, now
            await session.execute(update(ReplicaRow).values(canary=ReplicaRow.id.in_(replicas or [])))
            return row.revision

    # Replicas

    async def beat(self, id: str, checkpoint: str, state: str, failed: int | None, message: str) -> tuple[Wanted, bool]:
        """Say what a replica does; comes back with what is wanted, and whether of this one as a canary."""
        async with self._write() as (session, now):
            row = await session.get(ReplicaRow, id)
            if row is None:
                row = ReplicaRow(id=id, canary=False)
                session.add(row)
            row.checkpoint, row.state, row.failed_revision, row.message = checkpoint, state, failed, message
            row.heartbeat_at = now
            if row.turn_until is not None:
                row.turn_until = now + TURN_SECONDS
            await session.execute(delete(ReplicaRow).where(ReplicaRow.heartbeat_at < now - FORGET_SECONDS))
            return _wanted(await session.get_one(DeploymentRow, 1), now), row.canary

    async def take_turn(self, id: str, at_once: int) -> bool:
        """Whether this replica may change its checkpoint now: `at_once` may, the others wait."""
        async with self._write() as (session, now):
            # Whoever asks meanwhile waits for this row, and then sees the turn that was given here.
            await session.get_one(DeploymentRow, 1, with_for_update=True)
            taken = select(func.count()).where(ReplicaRow.turn_until > now, ReplicaRow.id != id)
            if (await session.scalar(taken) or 0) >= at_once:
                return False
            mine = update(ReplicaRow).where(ReplicaRow.id == id).values(turn_until=now + TURN_SECONDS)
            return bool(cast(CursorResult[Any], await session.execute(mine)).rowcount)

    async def end_turn(self, id: str) -> None:
        async with self._write() as (session, _):
            await session.execute(update(ReplicaRow).where(ReplicaRow.id == id).values(turn_until=None))

    async def leave(self, id: str) -> None:
        """This replica ends."""
        async with self._write() as (session, _):
            await session.execute(delete(ReplicaRow).where(ReplicaRow.id == id))

    async def replicas(self) -> list[Replica]:
        """Those that live, and those that stopped saying so within the last hour."""
        async with self._read() as (session, now):
            rows = await session.scalars(select(ReplicaRow).order_by(ReplicaRow.id))
            return [
                Replica(r.id, r.checkpoint, r.canary, r.state, r.failed_revision, r.message, now - r.heartbeat_at)
                for r in rows
            ]

    # Adapters

    async def adapters(self) -> dict[str, Place | None]:
        """What administrators have made of each adapter's name; None where they removed it."""
        async with self._read() as (session, _):
            rows = await session.scalars(select(AdapterRow).order_by(AdapterRow.name))
            return {row.name: Place(Path(row.directory), row.revision) if row.directory else None for row in rows}

    async def want_adapter(self, name: str, place: Place | None) -> None:
        """All replicas are to apply what is there under this name, or nothing."""
        async with self._write() as (session, now):
            row = await session.get(AdapterRow, name) or AdapterRow(name=name)
            row.directory, row.revision = (str(place.directory), place.revision) if place else (None, None)
            row.changed_at = now
            session.add(row)

    # Audit

    async def begin_action(self, who: str, what: str, checkpoint: str | None, replica: str) -> int:
        async with self._write() as (session, now):
            row = AuditRow(who=who, what=what, checkpoint=checkpoint, replica=replica, begun_at=now)
            session.add(row)
            await session.flush()
            return row.number

    async def end_action(self, number: int, result: str, message: str) -> None:
        async with self._write() as (session, now):
            ended = update(AuditRow).where(AuditRow.number == number)
            await session.execute(ended.values(ended_at=now, result=result, message=message))

    async def audit(self, limit: int, before: int | None) -> list[dict[str, Any]]:
        """Actions, the newest first, older than the one numbered `before`."""
        query = select(AuditRow).order_by(AuditRow.number.desc()).limit(limit)
        if before is not None:
            query = query.where(AuditRow.number < before)
        async with self._read() as (session, _):
            columns = [column.key for column in AuditRow.__table__.columns]
            return [{name: getattr(row, name) for name in columns} for row in await session.scalars(query)]


async def _held(session: AsyncSession, token: str) -> DeploymentRow:
    row = await session.get_one(DeploymentRow, 1, with_for_update=True)
    if row.busy_token != token:
        raise Busy(f"the deployment was taken over by {row.busy_who or 'someone'} meanwhile")
    return row


def _wanted(row: DeploymentRow, now: float) -> Wanted:
    busy = row.busy_until is not None and row.busy_until > now
    who, what = (row.busy_who, row.busy_what) if busy else (None, None)
    return Wanted(row.desired, row.previous, row.candidate, row.share, row.revision, who, what)
