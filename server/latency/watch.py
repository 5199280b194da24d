"""What surrounds a measurement: whether the client itself was the bottleneck, and what the server's metrics say."""

from __future__ import annotations

import asyncio
import re
import time
from types import TracebackType

import numpy as np
from pydantic import BaseModel, ConfigDict

TICK_S = 0.01
LAG_LIMIT_MS = 20.0  # p99; later than this, TTFT and inter-token times are the client's own
CPU_LIMIT = 0.85  # of one core: Python runs the load generator on one


class ClientHealth(BaseModel):
    """The load generator's own state in one stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lag_p99_ms: float
    lag_max_ms: float
    cpu_share: float
    saturated: bool


class ClientWatch:
    """Async context that samples how late the event loop wakes up, and this process's share of one core."""

    def __init__(self) -> None:
        self.lags: list[float] = []

    async def __aenter__(self) -> ClientWatch:
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        self.task = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.task.cancel()
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu

    async def _tick(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(TICK_S)
            self.lags.append(time.perf_counter() - before - TICK_S)

    def health(self) -> ClientHealth:
        """After the context closed."""
        lags = np.maximum(self.lags or [0.0], 0.0) * 1e3
        p99, share = float(np.percentile(lags, 99)), self.cpu / self.wall
        return ClientHealth(
            lag_p99_ms=p99,
            lag_max_ms=float(lags.max()),
            cpu_share=share,
            saturated=p99 > LAG_LIMIT_MS or share > CPU_LIMIT,
        )


COUNTERS = {
    "prefix_hits": "vllm:prefix_cache_hits_total",
    "prefix_queries": "vllm:prefix_cache_queries_total",
    "queue_s": "vllm:request_queue_time_seconds_sum",
    "queued": "vllm:request_queue_time_seconds_count",
    "preemptions": "vllm:num_preemptions_total",
}
SERIES = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)", re.MULTILINE)


class ServerDelta(BaseModel):
    """What vLLM's counters gained in one stage. None: nothing was counted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefix_hit_rate: float | None
    queue_mean_ms: float | None
    preemptions: float


def read_counters(exposition: str | None) -> dict[str, float] | None:
    """The counters above from Prometheus text, summed over labels; None when the endpoint exposes none of them."""
    totals: dict[str, float] = {}
    for name, value in SERIES.findall(exposition or ""):
        totals[name] = totals.get(name, 0.0) + float(value)
    found = {key: totals[name] for key, name in COUNTERS.items() if name in totals}
    return {key: found.get(key, 0.0) for key in COUNTERS} if found else None


def server_delta(before: dict[str, float] | None, after: dict[str, float] | None) -> ServerDelta | None:
    """What happened in between; None without metrics, or when a counter fell because the server restarted."""
    if before is None or after is None or any(after[key] < before[key] for key in COUNTERS):
        return None
    gained = {key: after[key] - before[key] for key in COUNTERS}
    return ServerDelta(
        prefix_hit_rate=gained["prefix_hits"] / gained["prefix_queries"] if gained["prefix_queries"] else None,
        queue_mean_ms=1e3 * gained["queue_s"] / gained["queued"] if gained["queued"] else None,
        preemptions=gained["preemptions"],
    )
