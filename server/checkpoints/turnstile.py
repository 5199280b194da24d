"""Where every generation passes before it may use the engine, so that the weights change while nobody is inside."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from server.checkpoints.serving import Serving
from server.metrics import WAITING

POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Waits:
    """Requests that waited while the turnstile was closed, and the longest wait in seconds."""

    requests: int = 0
    longest: float = 0.0


class Turnstile:
    """Lets generations in, each with the checkpoint that will answer it; closed, they wait in the order they came.

    Who is inside is asked of two counters: visits that have not yet handed their prompts to the engine, and requests
    that the engine has not finished. A client that reads slowly holds nobody up.
    """

    def __init__(self, serving: Serving, unfinished: Callable[[], int]) -> None:
        """`unfinished` says how many requests the engine has not finished."""
        self.serving = serving
        self.closed = False
        self._unfinished = unfinished
        self._entering = 0
        self._queue: deque[tuple[float, asyncio.Future[Serving]]] = deque()
        self._waited = Waits()
        self._shut: Exception | None = None

    @property
    def inside(self) -> int:
        return self._entering + self._unfinished()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def enter(self) -> Serving:
        """Wait for the turnstile to be open. Whoever entered calls `leave` once, when the engine has the prompts."""
        if self._shut:
            raise self._shut
        if self.closed:
            return await self._wait()
        self._entering += 1
        return self.serving

    async def _wait(self) -> Serving:
        since, turn = time.monotonic(), asyncio.get_running_loop().create_future()
        self._queue.append((since, turn))
        WAITING.inc()
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                # Let in and gone in the same moment.
                self.leave()
            elif (since, turn) in self._queue:
                self._queue.remove((since, turn))
                self._count(since)
            raise
        finally:
            WAITING.dec()

    def leave(self) -> None:
        self._entering -= 1

    def close(self) -> None:
        """Let nobody in until `open`."""
        self.closed, self._waited = True, Waits()

    def open(self) -> Waits:
        """Let everyone in who waits, in order; says who waited since `close`."""
        self.closed = False
        while self._queue:
            since, turn = self._queue.popleft()
            self._count(since)
            if not turn.cancelled():
                # Inside from this moment on: whoever closes it next waits for them too.
                self._entering += 1
                turn.set_result(self.serving)
        return self._waited

    def shut(self, error: Exception) -> None:
        """Refuse everyone, from now on and among those who wait, with `error`: there is nothing left to wait for."""
        self._shut = error
        while self._queue:
            _, turn = self._queue.popleft()
            if not turn.cancelled():
                turn.set_exception(error)

    def _count(self, since: float) -> None:
        self._waited = Waits(self._waited.requests + 1, max(self._waited.longest, time.monotonic() - since))

    async def empty(self, seconds: float) -> bool:
        """Wait, up to `seconds`, until nobody is inside; whether that came."""
        deadline = time.monotonic() + seconds
        while self.inside:
            if time.monotonic() >= deadline:
                return False
            # The engine does not announce that it has finished.
            await asyncio.sleep(POLL_SECONDS)
        return True


class Visit:
    """One request's way through the turnstile."""

    def __init__(self, turnstile: Turnstile) -> None:
        self._turnstile = turnstile
        self.inside = False

    async def enter(self) -> Serving:
        """The checkpoint that will answer."""
        serving = await self._turnstile.enter()
        self.inside = True
        return serving

    def leave(self) -> None:
        """The engine has all of the prompts, or will get none."""
        if self.inside:
            self.inside = False
            self._turnstile.leave()
