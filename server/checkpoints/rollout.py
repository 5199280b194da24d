"""What an administrator does to all replicas, step by step: activate, canary, promote, abort."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from server.checkpoints.activate import Outcome
from server.checkpoints.deployment import BUSY_SECONDS, Busy, Deployment, Replica
from server.checkpoints.errors import CheckpointError
from server.checkpoints.replica import POLL_SECONDS, Follower
from server.conversations.errors import StoreError, StoreUnavailable

log = logging.getLogger(__name__)

COMMIT_SECONDS = 10.0
CONVERGE_SECONDS = 1800.0
"""How long the others may take. They go on following when the report has been given."""

Emit = Callable[[str, dict[str, Any]], None]
"""Told of progress: the event's name and what there is to say."""


class Conflict(CheckpointError):
    """What is asked for does not fit what the deployment is doing."""


class Unconfirmed(CheckpointError):
    """The database was lost in the middle of a commit."""


Undo = Callable[[], Awaitable[None]]


class Rollout:
    """The actions of one process's administrators. Each ends in a report, and in the audit log."""

    def __init__(self, follower: Follower, deployment: Deployment) -> None:
        self.follower, self.deployment = follower, deployment

    @asynccontextmanager
    async def holding(self, who: str, what: str, checkpoint: str | None) -> AsyncIterator[Action]:
        """Hold the deployment for an action that is audited. Raises Busy, StoreError."""
        number = await self.deployment.begin_action(who, what, checkpoint, self.follower.id)
        try:
            token = await self.deployment.take(who, f"{what} {checkpoint}" if checkpoint else what)
        except Busy as error:
            await self.deployment.end_action(number, "refused", str(error))
            raise
        action = Action(token)
        keeping = asyncio.create_task(self._keep(token))
        try:
            yield action
        except Exception as error:
            action.result = "refused" if isinstance(error, Conflict) else "failed"
            action.message = str(error)
            raise
        finally:
            keeping.cancel()
            with suppress(StoreError):
                await self.deployment.release(token)
                await self.deployment.end_action(number, action.result, action.message)

    async def _keep(self, token: str) -> None:
        while True:
            await asyncio.sleep(BUSY_SECONDS / 6)
            with suppress(StoreError, Busy):
                await self.deployment.keep(token)

    # Each of the following returns the report; `action` was held for it

    async def activate(self, action: Action, id: str, share: float | None, emit: Emit) -> dict[str, Any]:
        """Serve `id`: everywhere, or for a share of the conversations."""
        wanted = await self.deployment.wanted()
        if wanted.candidate is not None:
            raise Conflict(f"{wanted.candidate} is served to a share of the conversations: promote or abort it first")
        before = wanted.desired or self.follower.serving
        if share is not None and id == before:
            raise Conflict(f"{id} is served to everyone already")
        canaries = await self._canaries(share) if share is not None else []

        async def commit() -> None:
            try:
                async with asyncio.timeout(COMMIT_SECONDS):
                    if share is None:
                        await self.deployment.want(action.token, id, before)
                    else:
                        await self.deployment.want_canary(action.token, id, share, canaries, before)
            except (StoreUnavailable, TimeoutError):
                raise Unconfirmed(
                    f"the database did not confirm {id}. Should it have taken it, every replica follows within "
                    "seconds: see bimedix checkpoints status"
                ) from None

        outcome = await self.follower.activate(
            id, lambda phase: emit("phase", {"phase": phase, "replica": self.follower.id}), commit
        )
        if outcome.result == "unchanged" and id != wanted.desired:
            await commit()

        async def undo() -> None:
            if share is None:
                await self.deployment.want(action.token, before, id)
            else:
                await self.deployment.end_canary(action.token)

        return await self._finish(action, outcome, emit, undo)

    async def promote(self, action: Action, emit: Emit) -> dict[str, Any]:
        """Serve the canary's checkpoint everywhere."""
        wanted = await self.deployment.wanted()
        new, old = wanted.candidate, wanted.desired
        if new is None or old is None:
            raise Conflict("there is no canary to promote")
        await self.deployment.want(action.token, new, old)

        async def undo() -> None:
            await self.deployment.want(action.token, old, new)

        return await self._finish(action, Outcome(new, old), emit, undo)

    async def abort(self, action: Action, emit: Emit) -> dict[str, Any]:
        """Take the canary back."""
        wanted = await self.deployment.wanted()
        if wanted.candidate is None or wanted.desired is None:
            raise Conflict("there is no canary to abort")
        await self.deployment.end_canary(action.token)
        return await self._finish(action, Outcome(wanted.desired, wanted.candidate), emit, None)

    async def _canaries(self, share: float) -> list[str]:
        """This replica, and as many more as carry the share; at least one other is left."""
        others = [one.id for one in await self.deployment.replicas() if one.alive and one.id != self.follower.id]
        if not others:
            raise Conflict("a canary needs a second replica to serve the other conversations")
        return [self.follower.id, *others][: max(1, min(len(others), round(share * (len(others) + 1))))]

    async def _finish(self, action: Action, outcome: Outcome, emit: Emit, undo: Undo | None) -> dict[str, Any]:
        """Wait for the others, and `undo` it for everyone when one of them can't follow."""
        result, message = outcome.result, outcome.message
        if result in {"activated", "unchanged"}:
            failed, missing = await self._converge(emit)
            if failed and undo:
                await undo()
                message = f"{failed[0].id}: {failed[0].message}"
                result = "rolled_back"
                _, missing = await self._converge(emit)
            if missing:
                message += f" Still on their way: {', '.join(one.id for one in missing)}"
        action.result, action.message = result, message
        report = {**outcome.as_json(), "result": result, "message": message.strip(), "serving": self.follower.serving}
        with suppress(StoreError):
            await self.follower.beat()
            report["replicas"] = [as_json(one) for one in await self.deployment.replicas() if one.alive]
        return report

    async def _converge(self, emit: Emit) -> tuple[list[Replica], list[Replica]]:
        """Wait for all that live to serve what is wanted of them: those that can't, and those that did not in time."""
        deadline, told = time.monotonic() + CONVERGE_SECONDS, -1
        while True:
            with suppress(StoreError):
                await self.follower.beat()
                wanted = await self.deployment.wanted()
                living = [one for one in await self.deployment.replicas() if one.alive]
                failed = [one for one in living if one.failed_revision == wanted.revision]
                missing = [one for one in living if one.checkpoint != wanted.target(one.canary)]
                if told != len(missing):
                    told = len(missing)
                    emit("replicas", {"ready": len(living) - told, "of": len(living)})
                if failed or not missing or time.monotonic() > deadline:
                    return failed, missing
            await asyncio.sleep(POLL_SECONDS / 4)


@dataclass
class Action:
    """An action under way, and how it ended."""

    token: str
    result: str = "interrupted"
    message: str = ""


def as_json(replica: Replica) -> dict[str, Any]:
    return {
        "id": replica.id,
        "checkpoint": replica.checkpoint,
        "canary": replica.canary,
        "state": replica.state if replica.alive else "gone",
        "message": replica.message,
        "seconds_since_heartbeat": round(replica.age, 1),
    }
