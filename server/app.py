"""create_app: settings to a FastAPI application whose lifespan holds the engine and the conversation store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from server import engine, errors, metrics
from server.conversations import problems
from server.conversations.errors import StoreUnavailable
from server.conversations.store import Store
from server.routes import chat, conversations, health, responses
from server.service import Service
from server.settings import Settings

log = logging.getLogger(__name__)

DESCRIPTION = (
    "A bilingual Arabic-English medical assistant behind OpenAI's API. "
    "For research: not for clinical use, and no substitute for a health professional."
)


def create_app(settings: Settings, on_ready: Callable[[Service], None] | None = None) -> FastAPI:
    """The application. It answers /health while the engine loads; `on_ready` is called once the engine answers."""
    service = Service(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        stop = asyncio.Event()
        loading = asyncio.create_task(hold_engine(service, stop, on_ready))
        loading.add_done_callback(app.state.on_engine_end)
        try:
            yield
        finally:
            stop.set()
            await asyncio.gather(loading, return_exceptions=True)

    app = FastAPI(
        title="BiMediX", version=version("bimedix"), description=DESCRIPTION, lifespan=lifespan,
        docs_url=None, redoc_url=None,
    )  # fmt: skip
    app.state.service = service
    app.state.settings = settings
    app.state.keys = settings.keys
    app.state.on_engine_end = lambda task: None
    app.add_middleware(metrics.CountRequests)
    errors.install(app)
    problems.install(app)
    app.include_router(chat.router)
    app.include_router(responses.router)
    app.include_router(conversations.router)
    app.include_router(health.router)
    health.add_docs(app)
    return app


async def hold_engine(service: Service, stop: asyncio.Event, on_ready: Callable[[Service], None] | None) -> None:
    """Open the store, start the engine, hand it to `service` when it answers, and keep both until `stop`."""
    async with opened(service.store), engine.start(service.settings) as started:
        if not await started.answers():
            raise RuntimeError("the engine started but does not answer")
        service.engine = started
        if on_ready:
            on_ready(service)
        await stop.wait()
        service.engine = None


@asynccontextmanager
async def opened(store: Store) -> AsyncIterator[None]:
    """Keep `store` open. One that cannot be reached opens by itself later. Raises SchemaMismatch."""
    try:
        await store.open()
    except StoreUnavailable as error:
        log.warning("%s; chat completions without a conversation are served", error)
    try:
        yield
    finally:
        await store.close()
