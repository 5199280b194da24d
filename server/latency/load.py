"""Kinds of load, all bounded: closed loop, open loop with Poisson arrivals, and conversations with think time."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from server.latency.endpoint import Endpoint, Sample, Turn
from server.latency.prompts import Prompt


@dataclass
class Allowance:
    """What a whole run may still spend. `take` is asked before every request."""

    requests: int
    ends: float = field(metadata={"unit": "perf_counter seconds"})

    def take(self) -> bool:
        """Whether one more request may start; counts it."""
        if self.requests <= 0 or time.perf_counter() >= self.ends:
            return False
        self.requests -= 1
        return True


@dataclass
class Stage:
    """One stretch of load at one level. `requests` and `seconds` bound what is started, not how long replies take."""

    number: int
    endpoint: Endpoint
    source: Iterator[Prompt]
    allowance: Allowance
    requests: int
    seconds: float
    advance: Callable[[], None]
    samples: list[Sample] = field(default_factory=list)
    began: float = 0.0
    full_until: float = 0.0  # when offered load first fell below the level (perf_counter seconds)

    def begin(self) -> None:
        self.began = time.perf_counter()

    def take(self) -> bool:
        """Whether the stage may start one more request."""
        if self.requests <= 0 or time.perf_counter() >= self.began + self.seconds or not self.allowance.take():
            self.full_until = self.full_until or time.perf_counter()
            return False
        self.requests -= 1
        return True

    async def send(self, turn: Turn) -> Sample:
        """Send and keep one turn."""
        sample = await self.endpoint.send(turn, self.number, self.began)
        self.samples.append(sample)
        self.advance()
        return sample


def opening(prompt: Prompt, due: float) -> Turn:
    """A first turn."""
    return Turn([{"role": "user", "content": prompt.text}], prompt.language, prompt.words, due)


async def closed_loop(stage: Stage, concurrency: int) -> None:
    """`concurrency` users who ask again as soon as they are answered."""

    async def user() -> None:
        while stage.take():
            await stage.send(opening(next(stage.source), time.perf_counter()))

    stage.begin()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(user())


async def open_loop(stage: Stage, rate: float, rng: random.Random) -> None:
    """Requests at `rate` a second on average, with exponential gaps, whether or not earlier ones were answered.

    Latency counts from when a request was due, so a client that falls behind cannot hide waiting ("coordinated
    omission").
    """
    stage.begin()
    due = stage.began
    async with asyncio.TaskGroup() as group:
        while stage.take():
            group.create_task(stage.send(opening(next(stage.source), due)))
            due += rng.expovariate(rate)
            if due > stage.began + stage.seconds:
                break
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
    stage.full_until = time.perf_counter()


async def conversations(stage: Stage, users: int, turns: int, think_s: float, rng: random.Random) -> None:
    """`users` who each hold conversations of `turns` turns and think for `think_s` seconds on average in between.

    History carries the replies that really came; a failed reply ends its conversation.
    """

    async def converse() -> None:
        history: list[dict[str, str]] = []
        for number in range(1, turns + 1):
            if number > 1:
                await asyncio.sleep(rng.expovariate(1 / think_s) if think_s else 0)
            if not stage.take():
                return
            prompt = next(stage.source)
            history.append({"role": "user", "content": prompt.text})
            turn = Turn(list(history), prompt.language, prompt.words, time.perf_counter(), number)
            sample = await stage.send(turn)
            if sample.record.outcome != "ok":
                return
            history.append({"role": "assistant", "content": sample.reply.text})

    async def user() -> None:
        while not stage.full_until:
            await converse()

    stage.begin()
    async with asyncio.TaskGroup() as group:
        for _ in range(users):
            group.create_task(user())
