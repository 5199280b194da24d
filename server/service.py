"""The state that routes share: the engine once it is there, and whether new requests are still taken."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi import Request

from server.checkpoints.adapter_set import AdapterSet
from server.checkpoints.deployment import Deployment
from server.checkpoints.replica import Follower, Pool, new_id
from server.checkpoints.turnstile import Visit
from server.conversations.database import default_url
from server.conversations.store import Store
from server.engine import Engine
from server.errors import unavailable
from server.settings import Settings


class Service:
    """One process's engine, from loading to draining, and its conversations. Raises ValueError for a bad store URL."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.replica = new_id()
        self.store = Store(settings.store or default_url(), conversation_ttl=settings.conversation_ttl)
        self.deployment = Deployment(self.store.database)
        self.engine: Engine | None = None
        self.follower: Follower | None = None
        """Follows the wanted checkpoint, where there is a registry."""
        self.adapters: AdapterSet | None = None
        """Where vLLM applies adapters."""
        self.actions: set[asyncio.Task[None]] = set()
        """What administrators have begun."""
        self.draining = False
        self.failed = False
        self.running = 0
        """Generations in progress, their responses included."""

    def loaded(self) -> Engine:
        """The engine. Raises ApiError 503 while it loads, and once the service drains."""
        if self.draining:
            raise unavailable("The service is shutting down.", retry_after=5, code="shutting_down")
        if self.engine is None:
            raise unavailable("The model is still loading.", retry_after=10, code="loading")
        return self.engine


def service(request: Request) -> Service:
    state: Service = request.app.state.service
    return state


@dataclass(frozen=True)
class Admission:
    """A generation's engine, and its visit at the turnstile, which it has still to enter."""

    engine: Engine
    visit: Visit
    follower: Follower | None

    def pool(self, conversation_id: str | None) -> Pool | None:
        """Which replicas a conversation belongs to, while there is a canary."""
        return self.follower.pool_of(conversation_id) if self.follower else None


async def admitted(request: Request) -> AsyncIterator[Admission]:
    """FastAPI dependency: the engine, for a generation that counts as running until its last byte is sent."""
    current = service(request)
    engine = current.loaded()
    visit = Visit(engine.turnstile)
    current.running += 1
    try:
        yield Admission(engine, visit, current.follower)
    finally:
        visit.leave()
        current.running -= 1
