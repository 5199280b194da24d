"""This process among the replicas: what it starts with, what it says of itself, and how it follows what is wanted."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import secrets
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

from server.checkpoints.activate import Activator, Catalogue, Outcome, Phase, nothing
from server.checkpoints.deployment import Deployment, Wanted, in_share
from server.checkpoints.errors import CheckpointError
from server.checkpoints.serving import Serving
from server.checkpoints.verify import verify
from server.conversations.errors import StoreError, StoreUnavailable

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
START_SECONDS = 15.0
"""How long a start waits for the database before it goes by the note."""
Pool = Literal["stable", "canary"]
NOTE = ".last-good.json"
FAILED = {"refused", "rolled_back"}
"""What trying again would not change."""


def new_id() -> str:
    """A name for this process among the replicas."""
    return f"{socket.gethostname()[:60]}-{os.getpid()}-{secrets.token_hex(3)}"


async def starting_point(catalogue: Catalogue, deployment: Deployment) -> Serving:
    """The checkpoint to start with: the wanted one, else the one before it, else the one that was configured.

    Without a database it is the one that this registry's replicas served last, as they noted.
    """
    try:
        async with asyncio.timeout(START_SECONDS):
            wanted = await deployment.wanted()
        names = [wanted.desired, wanted.previous] if wanted.desired else []
    except (StoreUnavailable, TimeoutError) as error:
        names = [read_note(catalogue.registry.root)]
        log.warning("the wanted checkpoint is not known (%s); starting with %s", error, names[0] or catalogue.base.id)
    for name in filter(None, names):
        try:
            checkpoint = catalogue.get(name)
            await asyncio.to_thread(verify, checkpoint, None)
        except (CheckpointError, OSError) as error:
            log.warning("not starting with %s: %s", name, error)
        else:
            return Serving(checkpoint.id, str(checkpoint.path), checkpoint.manifest)
    return catalogue.base


def read_note(root: Path) -> str | None:
    """The checkpoint that was served last, where the registry has a note of it."""
    try:
        noted = json.loads((root / NOTE).read_text(encoding="utf-8"))["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return noted if isinstance(noted, str) else None


def write_note(root: Path, id: str) -> None:
    """Note what is served, for a start without a database. A registry that can't be written to goes without."""
    unfinished = root / f"{NOTE}.{os.getpid()}"
    try:
        unfinished.write_text(json.dumps({"id": id}), encoding="utf-8")
        unfinished.replace(root / NOTE)
    except OSError as error:
        log.warning("the registry keeps no note of %s: %s", id, error.strerror)


async def keep_following(who: str, follow: Callable[[], Awaitable[None]]) -> None:
    """Call `follow` about every second until cancelled; what it raises is logged."""
    complaint = ""
    while True:
        try:
            await follow()
            complaint = ""
        except StoreError as error:
            # Once per trouble, not once per second.
            if str(error) != complaint:
                log.warning("%s: %s", who, error)
                complaint = str(error)
        except Exception:
            log.exception("%s: following failed", who)
        await asyncio.sleep(POLL_SECONDS * random.uniform(0.75, 1.25))


class Follower:
    """Tells the database what this replica serves, and follows what the database wants."""

    def __init__(self, id: str, activator: Activator, deployment: Deployment, at_once: int) -> None:
        """`at_once`: how many replicas may change their checkpoint at the same time."""
        self.id, self.activator, self.deployment, self.at_once = id, activator, deployment, at_once
        self.broken = asyncio.Event()
        self.message = ""
        self.failed_revision: int | None = None
        self.wanted: Wanted | None = None
        """As it was when this replica last heard of it."""
        self.canary = False
        self._changing = asyncio.Lock()
        self._following: asyncio.Task[None] | None = None
        self._noted: str | None = None

    @property
    def serving(self) -> str:
        return self.activator.engine.serving.id

    @property
    def state(self) -> str:
        if self._changing.locked():
            return "activating"
        return "serving" if self.failed_revision is None else "failed"

    @property
    def pool(self) -> Pool | None:
        """Which conversations this replica is for; None between two checkpoints."""
        if self.wanted is None or self.wanted.candidate is None:
            return "stable"
        if self.serving != self.wanted.target(self.canary):
            return None
        return "canary" if self.canary else "stable"

    def pool_of(self, conversation_id: str | None) -> Pool | None:
        """Which replicas a conversation belongs to while there is a canary."""
        if conversation_id is None or self.wanted is None or self.wanted.share is None:
            return None
        return "canary" if in_share(conversation_id, self.wanted.share) else "stable"

    async def activate(
        self, id: str, announce: Callable[[Phase], None], commit: Callable[[], Awaitable[None]] = nothing
    ) -> Outcome:
        """Change this replica's checkpoint, after any change that is under way."""
        async with self._changing:
            outcome = await self.activator.activate(id, announce, commit)
        if outcome.result == "broken":
            self.message = outcome.message
            self.broken.set()
        return outcome

    async def run(self) -> None:
        """Until cancelled."""
        await keep_following("replica", self.beat)

    async def beat(self) -> None:
        """Say what this replica does, and begin to follow where something else is wanted."""
        wanted, self.canary = await self.deployment.beat(
            self.id, self.serving, self.state, self.failed_revision, self.message
        )
        self.wanted, target = wanted, wanted.target(self.canary)
        if self._changing.locked() or target is None:
            return
        if target == self.serving:
            self.failed_revision, self.message = None, ""
            await self._note(wanted)
        elif self.failed_revision != wanted.revision and (self._following is None or self._following.done()):
            self._following = asyncio.create_task(self._follow(target, wanted.revision))

    async def _note(self, wanted: Wanted) -> None:
        if wanted.desired and wanted.desired != self._noted:
            self._noted = wanted.desired
            await asyncio.to_thread(write_note, self.activator.catalogue.registry.root, wanted.desired)

    async def _follow(self, target: str, revision: int) -> None:
        try:
            if not await self.deployment.take_turn(self.id, self.at_once):
                return
            try:
                outcome = await self.activate(target, lambda phase: None)
            finally:
                await self.deployment.end_turn(self.id)
        except StoreError as error:
            log.warning("following to %s: %s", target, error)
            return
        self.message = outcome.message
        if outcome.result in FAILED:
            self.failed_revision = revision
        if outcome.result != "activated":
            log.warning("%s was not activated here: %s", target, outcome.message)

    async def stop(self) -> None:
        """Say goodbye, where the database still listens."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        try:
            async with asyncio.timeout(1):
                await self.deployment.leave(self.id)
        except (StoreError, TimeoutError):
            pass
