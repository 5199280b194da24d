"""The state that routes share: the engine once it is there, and whether new requests are still taken."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import Request

from server.conversations.database import default_url
from server.conversations.store import Store
from server.engine import Engine
from server.errors import unavailable
from server.settings import Settings


class Service:
    """One process's engine, from loading to draining, and its conversations. Raises ValueError for a bad store URL."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = Store(settings.store or default_url(), conversation_ttl=settings.conversation_ttl)
        self.engine: Engine | None = None
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


async def admitted(request: Request) -> AsyncIterator[Engine]:
    """FastAPI dependency: the engine, for a generation that counts as running until its last byte is sent."""
    current = service(request)
    engine = current.loaded()
    current.running += 1
    try:
        yield engine
    finally:
        current.running -= 1
