"""One replica's way from one checkpoint to another, and back when the new one does not pass."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from server.checkpoints.errors import CheckpointError, InvalidCheckpoint, UnknownCheckpoint
from server.checkpoints.gate import Canaries, Measured, judge, measure
from server.checkpoints.registry import Checkpoint, Registry
from server.checkpoints.serving import Serving
from server.checkpoints.turnstile import Waits
from server.checkpoints.verify import verify
from server.errors import unavailable
from server.metrics import ACTIVATION_SECONDS, ACTIVATIONS

if TYPE_CHECKING:
    from server.engine import Engine

log = logging.getLogger(__name__)

Phase = Literal["verify", "prepare", "drain", "reload", "gate", "commit", "restore"]
Result = Literal["activated", "unchanged", "refused", "gave_up", "rolled_back", "broken"]
PIECE = 8 << 20
UNWATCHED = "the gate did not see the router, which only a model that vLLM does not compile shows (--enforce-eager)"
SAME = 1.02
"""The perplexity of restored weights, at most so many times what it was: reloading is exact, batching rounds."""


@dataclass
class Outcome:
    """What came of an activation in this replica, with the seconds of each phase."""

    checkpoint: str
    previous: str
    result: Result = "activated"
    message: str = ""
    problems: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    waits: Waits = field(default_factory=Waits)
    showing: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "result": self.result,
            "checkpoint": self.checkpoint,
            "previous": self.previous,
            "message": self.message,
            "problems": self.problems,
            "seconds": {phase: round(taken, 4) for phase, taken in self.seconds.items()},
            "waited_requests": self.waits.requests,
            "longest_wait_seconds": round(self.waits.longest, 4),
            "gate": self.showing,
        }


class Stopped(CheckpointError):
    """The activation does not go on; what happened to it is `result`."""

    def __init__(self, result: Result, message: str, problems: list[str] | None = None) -> None:
        super().__init__(message)
        self.result, self.problems = result, problems or []


class Catalogue:
    """The checkpoints that this process can be given: the registry's, and the one it was configured with."""

    def __init__(self, registry: Registry, base: Serving) -> None:
        self.registry, self.base = registry, base

    def get(self, id: str) -> Checkpoint:
        """Raises UnknownCheckpoint, InvalidCheckpoint."""
        try:
            return self.registry.get(id)
        except UnknownCheckpoint:
            if id != self.base.id or self.base.manifest is None or self.base.directory is None:
                raise
            return Checkpoint(id, self.base.directory, self.base.manifest)

    def list(self) -> list[Checkpoint]:
        found = self.registry.list()
        if self.base.id not in {checkpoint.id for checkpoint in found} and self.base.manifest and self.base.directory:
            found.insert(0, self.get(self.base.id))
        return found


async def nothing() -> None:
    """What a replica commits that follows others."""


class Activator:
    """Changes the checkpoint of one engine. One activation at a time; its callers see to that."""

    def __init__(self, engine: Engine, catalogue: Catalogue, canaries: Canaries, drain_seconds: float) -> None:
        """`drain_seconds`: how long running replies may take to finish before an activation is given up."""
        self.engine, self.catalogue, self.canaries = engine, catalogue, canaries
        self.drain_seconds = drain_seconds
        self.phase: Phase | None = None
        self.stopping: Callable[[], bool] = lambda: False
        self._showing: tuple[str, Measured] | None = None

    async def activate(
        self, id: str, announce: Callable[[Phase], None], commit: Callable[[], Awaitable[None]] = nothing
    ) -> Outcome:
        """Serve `id` from now on; `commit` is called when it passed, before anyone sees it.

        Raises nothing but cancellation: the outcome says what went wrong, and that the previous checkpoint serves on.
        """
        outcome = Outcome(id, self.engine.serving.id)
        if id == outcome.previous:
            outcome.result, outcome.message = "unchanged", f"{id} is being served already"
            return outcome
        self._announce = announce
        try:
            await self._activate(outcome, commit)
        except Stopped as stopped:
            outcome.result, outcome.message, outcome.problems = stopped.result, str(stopped), stopped.problems
        except Exception as error:
            log.exception("an activation failed before anything was changed")
            outcome.result, outcome.message = "gave_up", f"unexpected {type(error).__name__}: {error}"
        finally:
            self.phase = None
        ACTIVATIONS.labels(outcome.result).inc()
        return outcome

    @contextmanager
    def _timed(self, outcome: Outcome, phase: Phase) -> Iterator[None]:
        self.phase = phase
        self._announce(phase)
        began = time.monotonic()
        try:
            yield
        finally:
            outcome.seconds[phase] = time.monotonic() - began
            ACTIVATION_SECONDS.labels(phase).observe(outcome.seconds[phase])

    async def _activate(self, outcome: Outcome, commit: Callable[[], Awaitable[None]]) -> None:
        old = self.engine.serving
        with self._timed(outcome, "verify"):
            new = await self._verified(outcome.checkpoint, old)
        with self._timed(outcome, "prepare"):
            await asyncio.to_thread(page_in, Path(new.source))
            before = await self._shown(old)
        if self.stopping():
            raise Stopped("gave_up", "the service is shutting down")
        turnstile = self.engine.turnstile
        turnstile.close()
        try:
            with self._timed(outcome, "drain"):
                if not await turnstile.empty(self.drain_seconds):
                    raise Stopped(
                        "gave_up",
                        f"{turnstile.inside} replies still ran after {self.drain_seconds:g} s; nothing was changed. "
                        "Try again, or allow more with --activation-drain-seconds",
                    )
            await self._swap(outcome, old, new, before, commit)
        finally:
            if outcome.result != "broken":
                outcome.waits = turnstile.open()

    async def _verified(self, id: str, old: Serving) -> Serving:
        try:
            checkpoint = self.catalogue.get(id)
            await asyncio.to_thread(verify, checkpoint, old.directory)
        except InvalidCheckpoint as error:
            raise Stopped("refused", str(error), error.problems) from None
        except (CheckpointError, OSError) as error:
            raise Stopped("refused", str(error)) from None
        return Serving(checkpoint.id, str(checkpoint.path), checkpoint.manifest)

    async def _shown(self, serving: Serving) -> Measured:
        """How the checkpoint in service does; measured once."""
        if self._showing is None or self._showing[0] != serving.id:
            self._showing = (serving.id, await measure(self.engine, serving, self.canaries))
        return self._showing[1]

    async def _swap(
        self, outcome: Outcome, old: Serving, new: Serving, before: Measured, commit: Callable[[], Awaitable[None]]
    ) -> None:
        """With nobody inside: the new weights, or the old ones again."""
        try:
            with self._timed(outcome, "reload"):
                await self.engine.reload(new)
            with self._timed(outcome, "gate"):
                after = await measure(self.engine, new, self.canaries)
            outcome.showing = {"previous": before.as_json(), "new": after.as_json()}
            if problems := judge(after, before, self.canaries.limits, self.engine.top_k):
                raise Stopped("rolled_back", f"{new.id} did not pass the gate: {'; '.join(problems)}", problems)
            with self._timed(outcome, "commit"):
                await commit()
        except Exception as error:
            await self._restore(outcome, old, before, error)
            if isinstance(error, Stopped):
                raise
            raise Stopped("rolled_back", f"{new.id} was not activated: {error}") from None
        if not after.used_experts:
            outcome.message = UNWATCHED
        self.engine.turnstile.serving = new
        self._showing = (new.id, after)

    async def _restore(self, outcome: Outcome, old: Serving, before: Measured, error: Exception) -> None:
        log.warning("activation failed, restoring %s: %s", old.id, error)
        try:
            with self._timed(outcome, "restore"):
                await self.engine.reload(old)
                restored = await measure(self.engine, old, self.canaries)
            ratios = [restored.perplexity[language] / ppl for language, ppl in before.perplexity.items()]
            if not restored.finite or max(ratios) > SAME:
                raise RuntimeError("its weights do not answer as before")
        except Exception as second:
            message = f"{error}; then {old.id} could not be restored: {second}"
            outcome.result = "broken"
            self.engine.turnstile.shut(unavailable("The engine has to restart.", retry_after=30, code="engine_broken"))
            raise Stopped("broken", message) from None


def page_in(directory: Path) -> None:
    """Read a checkpoint's weights, so that the kernel has them at hand when the engine asks for them."""
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(PIECE):
                pass
