"""Runs loads against endpoints and puts the outcome in one results object: `run` for one, `compare` for two."""

from __future__ import annotations

import math
import random
import time
from datetime import UTC, datetime
from statistics import fmean
from typing import Literal, Protocol

import aiohttp
from pydantic import Field, model_validator

from server.latency import load
from server.latency.endpoint import Endpoint, check_url, find_model, get_text, http_session, warmed
from server.latency.prompts import PromptLanguage, prompts
from server.latency.reply import Record
from server.latency.results import Comparison, Interval, Results, Target, this_machine
from server.latency.stats import bootstrap, knee
from server.latency.summary import Frozen, Limits, StageSummary, summarise
from server.latency.watch import ClientWatch, read_counters, server_delta

Mode = Literal["closed", "open", "sweep", "conversations", "table5"]
TABLE5_TOKENS = 512
SWEEP_GAIN = 1.05  # a doubling of users that brings less than 5% more throughput, twice in a row, ends a sweep


class Plan(Frozen):
    """What to send and when to stop. Lengths in words and tokens, times in seconds, rates per second."""

    mode: Mode = "closed"
    levels: list[float] = Field(min_length=1)
    languages: list[PromptLanguage] = Field(min_length=1)
    prompt_words: list[int] = Field(min_length=1)
    reply_tokens: int = Field(ge=1)
    fixed_length: bool
    requests: int = Field(ge=1, description="Per stage.")
    seconds: float = Field(gt=0, description="Per stage: how long requests are started.")
    max_requests: int = Field(ge=1, description="Over all stages.")
    max_seconds: float = Field(gt=0, description="Over all stages: after this, none is started.")
    timeout_s: float = Field(gt=0, description="Per request.")
    turns: int = Field(default=4, ge=1)
    think_s: float = Field(default=1.0, ge=0)
    rounds: int = Field(default=8, ge=2)
    seed: int = 0
    limits: Limits | None = None

    @model_validator(mode="after")
    def _possible(self) -> Plan:
        if min(self.levels) <= 0 or min(self.prompt_words) <= 0:
            raise ValueError("concurrency, rates and lengths must be positive")
        if self.mode != "open" and any(level != int(level) for level in self.levels):
            raise ValueError("concurrency must be whole numbers")
        return self


class Watcher(Protocol):
    """Who is told how far a measurement is."""

    def begin(self, stage: str, requests: int) -> None: ...

    def advance(self) -> None: ...

    def finish(self, line: str) -> None: ...


class Side(Frozen):
    """One endpoint as given on the command line; `model` empty takes the first that it lists."""

    name: str = ""
    url: str
    model: str = ""
    flags: str = ""


class Session:
    """What all stages of a measurement share: the plan, the allowance, the records so far, and who is told."""

    def __init__(self, plan: Plan, watcher: Watcher) -> None:
        self.plan, self.watcher = plan, watcher
        self.allowance = load.Allowance(plan.max_requests, time.perf_counter() + plan.max_seconds)
        self.stages: list[StageSummary] = []
        self.records: list[Record] = []

    async def stage(self, endpoint: Endpoint, level: float, seed: int, requests: int) -> StageSummary | None:
        """Run one stage; None when the allowance was spent before it sent anything."""
        plan, number, metrics = self.plan, len(self.stages) + 1, f"{endpoint.url}/metrics"
        source = prompts(plan.languages, plan.prompt_words, seed, endpoint.name)
        stage = load.Stage(number, endpoint, source, self.allowance, requests, plan.seconds, self.watcher.advance)
        self.watcher.begin(f"{plan.mode} {endpoint.name} {level:g}", requests)
        before = read_counters(await get_text(endpoint.session, metrics))
        async with ClientWatch() as watch:
            await self._drive(stage, level, random.Random(seed))
        after = read_counters(await get_text(endpoint.session, metrics))
        if not stage.samples:
            return None
        mode = "closed" if plan.mode in ("sweep", "table5") else plan.mode
        found = summarise(
            stage, mode, level, client=watch.health(), server=server_delta(before, after), limits=plan.limits
        )
        self.stages.append(found)
        self.records += [sample.record for sample in stage.samples]
        self.watcher.finish(_line(found))
        return found

    async def _drive(self, stage: load.Stage, level: float, rng: random.Random) -> None:
        if self.plan.mode == "open":
            await load.open_loop(stage, level, rng)
        elif self.plan.mode == "conversations":
            await load.conversations(stage, int(level), self.plan.turns, self.plan.think_s, rng)
        else:
            await load.closed_loop(stage, int(level))


async def run(side: Side, plan: Plan, *, allow_remote: bool, command: str, watcher: Watcher) -> Results:
    """Measure one endpoint. Raises EndpointError when it cannot be measured at all."""
    async with http_session() as http:
        endpoint, target = await _ready(http, side, plan, allow_remote)
        session = Session(plan, watcher)
        if plan.mode == "sweep":
            await _sweep(session, endpoint)
        else:
            for index, level in enumerate(plan.levels):
                # A closed loop with fewer than two rounds would measure mostly its own start.
                least = 1 if plan.mode == "open" else 2 * int(level)
                await session.stage(endpoint, level, plan.seed + index, max(plan.requests, least))
    closed = [stage for stage in session.stages if stage.mode == "closed"]
    levels, rates = [stage.level for stage in closed], [stage.total.tokens_per_s for stage in closed]
    return _results(session, [target], command, found_knee=knee(levels, rates) if len(closed) > 2 else None)


async def _sweep(session: Session, endpoint: Endpoint) -> None:
    """Double the users up to the highest level of the plan, or until throughput stopped growing."""
    level, best, flat = 1, 0.0, 0
    while level <= max(session.plan.levels) and flat < 2:
        requests = max(session.plan.requests, 3 * level)
        stage = await session.stage(endpoint, level, session.plan.seed + level, requests)
        if stage is None:
            return
        flat = 0 if stage.total.tokens_per_s > best * SWEEP_GAIN else flat + 1
        best, level = max(best, stage.total.tokens_per_s), level * 2


async def compare(a: Side, b: Side, plan: Plan, *, allow_remote: bool, command: str, watcher: Watcher) -> Results:
    """Measure two endpoints in turns: A B, then B A, and so on, so that drift of the machine hits both alike."""
    async with http_session() as http:
        first, target_a = await _ready(http, a, plan, allow_remote)
        second, target_b = await _ready(http, b, plan, allow_remote)
        session = Session(plan, watcher)
        comparisons = [await _level(session, first, second, level) for level in plan.levels]
    found = [comparison for comparison in comparisons if comparison]
    return _results(session, [target_a, target_b], command, comparisons=found)


async def _level(session: Session, a: Endpoint, b: Endpoint, level: float) -> Comparison | None:
    pairs: list[tuple[StageSummary, StageSummary]] = []
    for number in range(session.plan.rounds):
        seed = session.plan.seed + 1000 * number + int(level)
        order = (a, b) if number % 2 == 0 else (b, a)
        done = [await session.stage(one, level, seed, max(session.plan.requests, 3 * int(level))) for one in order]
        if done[0] is None or done[1] is None:
            break
        pairs.append((done[0], done[1]) if number % 2 == 0 else (done[1], done[0]))
    return compared(level, pairs) if pairs else None


def compared(level: float, pairs: list[tuple[StageSummary, StageSummary]]) -> Comparison | None:
    """A against B from pairs of stages. Rounds are what is resampled: requests within one share its conditions.

    None when no pair has successful replies on both sides.
    """
    usable = [(a.total, b.total) for a, b in pairs if a.total.ttft_ms and b.total.ttft_ms]
    waits = [(a.ttft_ms, b.ttft_ms) for a, b in usable if a.ttft_ms and b.ttft_ms]
    timed = [(a.tpot_ms.p50, b.tpot_ms.p50) for a, b in usable if a.tpot_ms and b.tpot_ms]
    if not timed:
        return None
    return Comparison(
        level=level,
        rounds=len(usable),
        failures={
            name: sum(sum(stage.total.failures.values()) for stage in side)
            for name, side in zip("AB", zip(*pairs, strict=True), strict=True)
        },
        tokens_per_s={"A": fmean(a.tokens_per_s for a, _ in usable), "B": fmean(b.tokens_per_s for _, b in usable)},
        ttft_ms={"A": fmean(a.p50 for a, _ in waits), "B": fmean(b.p50 for _, b in waits)},
        throughput_ratio=_ratio([(a.tokens_per_s, b.tokens_per_s) for a, b in usable]),
        ttft_added_ms=_interval([a.p50 - b.p50 for a, b in waits]),
        tpot_ratio=_ratio(timed),
    )


def _interval(values: list[float]) -> Interval:
    low, high = bootstrap(values, "mean")
    return Interval(value=sum(values) / len(values), low=low, high=high)


def _ratio(pairs: list[tuple[float, float]]) -> Interval:
    logs = _interval([math.log(a / b) for a, b in pairs])
    return Interval(value=math.exp(logs.value), low=math.exp(logs.low), high=math.exp(logs.high))


async def _ready(http: aiohttp.ClientSession, side: Side, plan: Plan, allow_remote: bool) -> tuple[Endpoint, Target]:
    """The endpoint, warmed up, and its description."""
    url = check_url(side.url, allow_remote)
    model = side.model or await find_model(http, url)
    endpoint = Endpoint(http, url, model, plan.reply_tokens, plan.fixed_length, plan.timeout_s, side.name)
    endpoint, checkpoint = await warmed(endpoint)
    version = await get_text(http, f"{url}/version")
    target = Target(name=side.name, url=url, model=model, checkpoint=checkpoint, version=version, flags=side.flags)
    return endpoint, target


def _results(
    session: Session,
    targets: list[Target],
    command: str,
    *,
    found_knee: float | None = None,
    comparisons: list[Comparison] | None = None,
) -> Results:
    return Results(
        kind="run" if comparisons is None else "compare",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        settings=session.plan.model_dump(exclude={"limits"}),
        limits=session.plan.limits,
        targets=targets,
        machine=this_machine(),
        stages=session.stages,
        knee=found_knee,
        comparisons=comparisons or [],
        requests=session.records,
    )


def _line(stage: StageSummary) -> str:
    """A finished stage in one line, for people who wait."""
    total = stage.total
    ttft = f"TTFT p50 {total.ttft_ms.p50:.1f} ms" if total.ttft_ms else "no reply"
    name = f" {stage.endpoint}" if stage.endpoint else ""
    return (
        f"{stage.mode}{name} {stage.level:g}: {total.ok}/{total.requests} ok, {ttft}, {total.tokens_per_s:.1f} tokens/s"
    )
