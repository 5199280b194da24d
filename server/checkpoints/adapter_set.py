"""The adapters that one process applies: as it was started with them, and as administrators change them since."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.checkpoints.deployment import Deployment, Place
from server.checkpoints.errors import CheckpointError
from server.checkpoints.replica import keep_following
from server.checkpoints.unmerged import Unmerged, read_unmerged
from server.conversations.errors import StoreError

if TYPE_CHECKING:
    from server.engine import Applied, Engine

log = logging.getLogger(__name__)

UNUSED_POLL_SECONDS = 0.02


class AdapterRefused(CheckpointError):
    """The adapter cannot be applied; the message says why."""


class UnknownAdapter(CheckpointError):
    """No adapter has this name."""


class AdapterSet:
    """Loads adapters into an engine and takes them out again. A name changes in one moment, from one whole adapter to
    the next; a revision goes when its last request has ended."""

    def __init__(self, engine: Engine, deployment: Deployment, configured: Mapping[str, Path]) -> None:
        """`configured` is what `--adapter` says; what the database says of a name overrides it."""
        self.engine, self.deployment = engine, deployment
        self.configured = {name: Place(directory) for name, directory in configured.items()}
        self.problems: dict[str, tuple[Place, str]] = {}
        """Adapters that are wanted and could not be loaded here."""
        self._changing = asyncio.Lock()
        self._retiring: dict[str, Applied] = {}
        """By revision: those without a name, which requests still use."""
        self._waiting: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load what was configured, and what the database says where it answers. Raises AdapterRefused."""
        for name, place in self.configured.items():
            self._publish(await self._load(name, place))
        try:
            await self.follow()
        except StoreError as error:
            log.warning("adapters: %s", error)

    async def add(self, name: str, directory: Path) -> tuple[Applied, Applied | None]:
        """Apply what is in `directory` under `name` from now on, here and soon on every replica.

        Comes back with it and the one that had the name before. Raises AdapterRefused, StoreError; nothing has
        changed then.
        """
        async with self._changing:
            old = self.engine.adapters.get(name)
            new = await self._load(name, Place(directory))
            try:
                await self.deployment.want_adapter(name, Place(directory, new.revision))
            except StoreError:
                if new is not old:
                    self._retire(new)
                raise
            self._publish(new)
            return new, old

    async def remove(self, name: str) -> tuple[Applied, float]:
        """Take `name` away, here and soon on every replica, and wait until the last request that uses it has ended.

        Comes back with what it was and the seconds that took. Raises UnknownAdapter, StoreError.
        """
        began = time.monotonic()
        async with self._changing:
            if name not in self.engine.adapters:
                raise UnknownAdapter(f"there is no adapter {name}")
            await self.deployment.want_adapter(name, None)
            old = self.engine.adapters.pop(name)
        await asyncio.shield(self._retire(old))
        return old, time.monotonic() - began

    def described(self) -> list[dict[str, Any]]:
        """Each adapter here: its directory and revision, how many requests use it, and what is wrong with it."""
        found = {
            name: {
                "name": name,
                "directory": str(applied.directory),
                "revision": applied.revision,
                "requests": self.engine.requests_of(applied),
                "problem": None,
            }
            for name, applied in self.engine.adapters.items()
        }
        for name, (place, problem) in self.problems.items():
            missing = {"name": name, "directory": str(place.directory), "revision": None, "requests": 0}
            found[name] = {**found.get(name, missing), "problem": problem}
        return [found[name] for name in sorted(found)]

    async def run(self) -> None:
        """Follow what the database says, until cancelled."""
        await keep_following("adapters", self.follow)

    async def follow(self) -> None:
        """Come to what the database says now. Raises StoreError."""
        async with self._changing:
            changed = await self.deployment.adapters()
            wanted = {name: place for name, place in {**self.configured, **changed}.items() if place}
            self.problems = {name: found for name, found in self.problems.items() if wanted.get(name) == found[0]}
            for name in self.engine.adapters.keys() - wanted.keys():
                self._retire(self.engine.adapters.pop(name))
            for name, place in wanted.items():
                current = self.engine.adapters.get(name)
                if name in self.problems or (current and place.revision in {None, current.revision}):
                    continue
                try:
                    self._publish(await self._load(name, place))
                except AdapterRefused as error:
                    self.problems[name] = (place, str(error))
                    log.warning("the adapter %s is not applied here: %s", name, error)

    async def stop(self) -> None:
        for task in self._waiting:
            task.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)

    async def _load(self, name: str, place: Place) -> Applied:
        """Load what is there, or find it loaded already. Raises AdapterRefused."""
        try:
            if name == self.engine.name:
                raise ValueError(f"{name} is the name of the model itself")
            adapter = await asyncio.to_thread(read_unmerged, name, place.directory)
            self.engine.check_adapter(adapter)
            digest = await asyncio.to_thread(adapter.verify, self.engine.expected_tensors)
            revision = adapter.revision(digest)
            if place.revision not in {None, revision}:
                raise ValueError(f"{place.directory} does not hold {place.revision} any more: it was {revision}")
            current = self.engine.adapters.get(name)
            if current and current.revision == revision:
                return current
            if returning := self._retiring.pop(revision, None):
                return returning
            applied = await self.engine.load_adapter(adapter, revision)
            # vLLM reads the file by its name: what it has loaded has to be what was checked.
            if not await asyncio.to_thread(self._is_still, adapter, digest):
                await self.engine.unload_adapter(applied)
                raise ValueError(f"{place.directory} changed while it was loaded")
        except (ValueError, RuntimeError) as error:
            raise AdapterRefused(str(error)) from None
        return applied

    def _is_still(self, adapter: Unmerged, digest: str) -> bool:
        try:
            return adapter.verify(self.engine.expected_tensors) == digest
        except ValueError:
            return False

    def _publish(self, applied: Applied) -> None:
        old = self.engine.adapters.get(applied.name)
        self.engine.adapters[applied.name] = applied
        if old and old is not applied:
            self._retire(old)

    def _retire(self, applied: Applied) -> asyncio.Task[None]:
        """Unload an adapter that has no name any more once its last request has ended, unless it is wanted again."""
        self._retiring[applied.revision] = applied
        task = asyncio.create_task(self._unload_unused(applied))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)
        return task

    async def _unload_unused(self, applied: Applied) -> None:
        while applied.revision in self._retiring:
            if not self.engine.requests_of(applied):
                del self._retiring[applied.revision]
                await self.engine.unload_adapter(applied)
                return
            # The engine does not announce that it has finished.
            await asyncio.sleep(UNUSED_POLL_SECONDS)
