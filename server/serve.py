"""Runs the application: start-up lines, readiness, and a shutdown that lets running replies finish."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import uvicorn

from server.app import create_app
from server.checkpoints.errors import CheckpointError
from server.checkpoints.manifest import read_manifest
from server.conversations.errors import StoreError
from server.engine_flags import parse_engine_flags
from server.protocol import BoundedHttpProtocol
from server.service import Service
from server.settings import EMBEDDED_CHECKPOINT, Settings

log = logging.getLogger("bimedix")


class DrainingServer(uvicorn.Server):
    """Uvicorn that on SIGTERM first stops taking generations and waits for those that run, and only then stops."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining or sig == signal.SIGINT:
            # A second signal, or Ctrl-C: whoever sits at the terminal wants it to end now.
            super().handle_exit(sig, frame)
            return
        self.service.draining = True
        self._captured_signals.append(sig)
        self._drain = asyncio.get_event_loop().create_task(self._stop_when_idle())

    async def _stop_when_idle(self) -> None:
        deadline = time.monotonic() + self.service.settings.drain_seconds
        print(f"Shutting down: {self.service.running} replies still run", flush=True)
        while self.service.running and time.monotonic() < deadline:  # noqa: ASYNC110 - the last one leaves unannounced
            await asyncio.sleep(0.05)
        self.should_exit = True


def run(settings: Settings) -> int:
    """Serve until told to stop; the exit status. Raises ValueError for flags that vLLM refuses."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    parse_engine_flags(settings)
    began = time.monotonic()
    announce_loading(settings)
    app = create_app(settings, on_ready=lambda service: announce_ready(service, began))
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=BoundedHttpProtocol,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=max(1, int(settings.drain_seconds)),
        server_header=False,
    )
    server = DrainingServer(config, app.state.service)
    app.state.on_engine_end = lambda task: stop_if_failed(server, task)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    return 0 if server.started and not app.state.service.failed else 1


def stop_if_failed(server: DrainingServer, task: asyncio.Task[None]) -> None:
    """End the process when the engine or the store could not start: a supervisor restarts it, and a person sees why."""
    if not task.cancelled() and (error := task.exception()):
        server.service.failed = True
        reason = str(error) if isinstance(error, StoreError | CheckpointError) else f"the engine did not start: {error}"
        print(f"bimedix: {reason}", file=sys.stderr, flush=True)
        server.should_exit = True


def announce_loading(settings: Settings) -> None:
    directory = Path(settings.model)
    print(
        f"Loading {settings.model}" if directory != EMBEDDED_CHECKPOINT else "Loading the embedded checkpoint",
        flush=True,
    )
    manifest = read_manifest(directory)
    if manifest:
        print(f"  {manifest.id}: {manifest.description}", flush=True)
    print("  research use only, not for clinical use", flush=True)


def announce_ready(service: Service, began: float) -> None:
    settings = service.settings
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    print(f"Ready in {time.monotonic() - began:.0f} s: http://{host}:{settings.port} (API docs at /docs)", flush=True)
