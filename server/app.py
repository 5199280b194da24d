"""create_app: settings to a FastAPI application whose lifespan holds the engine and the conversation store."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from server import engine, errors, metrics
from server.checkpoints.activate import Activator, Catalogue, Stopped
from server.checkpoints.adapter_set import AdapterSet
from server.checkpoints.gate import read_canaries
from server.checkpoints.registry import Registry
from server.checkpoints.replica import Follower, starting_point
from server.checkpoints.serving import read_serving
from server.checkpoints.unmerged import parse_entries
from server.conversations import problems
from server.conversations.errors import StoreUnavailable
from server.conversations.store import Store
from server.engine import Engine
from server.routes import adapters, admin, chat, conversations, health, responses
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
    read_canaries(settings.canaries)

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
    app.state.administrators = settings.administrators
    app.state.on_engine_end = lambda task: None
    app.add_middleware(metrics.CountRequests)
    errors.install(app)
    problems.install(app)
    app.include_router(chat.router)
    app.include_router(responses.router)
    app.include_router(conversations.router)
    app.include_router(admin.router)
    app.include_router(adapters.router)
    app.include_router(health.router)
    health.add_docs(app)
    return app


async def hold_engine(service: Service, stop: asyncio.Event, on_ready: Callable[[Service], None] | None) -> None:
    """Open the store, start the engine, hand it to `service` when it answers, and keep both until `stop`.

    Raises Stopped when an activation left the engine unfit to go on.
    """
    settings, base = service.settings, read_serving(service.settings.model)
    catalogue = Catalogue(Registry(settings.checkpoints), base) if settings.checkpoints else None
    async with opened(service.store):
        serving = await starting_point(catalogue, service.deployment) if catalogue else base
        if serving != base:
            print(f"The wanted checkpoint is {serving.id}: loading {serving.source}", flush=True)
        async with engine.start(settings, serving) as started:
            if not await started.answers():
                raise RuntimeError("the engine started but does not answer")
            async with following(service, started, catalogue), adapting(service, started):
                # Else a full collection now and then looks at what the libraries made when they were imported, and
                # everyone waits for half a second.
                gc.collect()
                gc.freeze()
                service.engine = started
                if on_ready:
                    on_ready(service)
                await stopped(service, stop)
                service.engine = None


@asynccontextmanager
async def following(service: Service, engine: Engine, catalogue: Catalogue | None) -> AsyncIterator[None]:
    """Keep this replica at the wanted checkpoint, where there is a registry."""
    if catalogue is None:
        yield
        return
    settings = service.settings
    activator = Activator(engine, catalogue, read_canaries(settings.canaries), settings.activation_drain_seconds)
    activator.stopping = lambda: service.draining
    service.follower = Follower(service.replica, activator, service.deployment, settings.activations_at_once)
    beating = asyncio.create_task(service.follower.run())
    try:
        yield
    finally:
        for task in (beating, *service.actions):
            task.cancel()
        await asyncio.gather(beating, *service.actions, return_exceptions=True)
        await service.follower.stop()


@asynccontextmanager
async def adapting(service: Service, engine: Engine) -> AsyncIterator[None]:
    """Apply the adapters that are wanted, where vLLM does so. Raises AdapterRefused for those of the flags."""
    settings = service.settings
    if not settings.takes_adapters:
        yield
        return
    service.adapters = AdapterSet(engine, service.deployment, parse_entries(settings.adapters))
    await service.adapters.start()
    following = asyncio.create_task(service.adapters.run())
    try:
        yield
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await service.adapters.stop()


async def stopped(service: Service, stop: asyncio.Event) -> None:
    """Wait for `stop`. Raises Stopped when the engine breaks before."""
    waits = [asyncio.create_task(stop.wait())]
    if service.follower:
        waits.append(asyncio.create_task(service.follower.broken.wait()))
    _, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    if not stop.is_set() and service.follower:
        raise Stopped("broken", service.follower.message)


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
