from __future__ import annotations

import asyncio
import time

import pytest

from server.latency.watch import ClientHealth, ClientWatch, read_counters, server_delta

BEFORE = """# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 10.0
vllm:prefix_cache_hits_total{engine="1",model_name="m"} 5.0
vllm:prefix_cache_queries_total{engine="0"} 100.0
vllm:request_queue_time_seconds_bucket{le="0.3"} 4.0
vllm:request_queue_time_seconds_sum{engine="0"} 1.5
vllm:request_queue_time_seconds_count{engine="0"} 4.0
"""
AFTER = BEFORE.replace(" 10.0", " 40.0").replace(" 100.0", " 160.0").replace(" 1.5", " 1.9").replace("} 4.0", "} 12.0")


def watch(work: float) -> ClientHealth:
    async def main() -> ClientHealth:
        async with ClientWatch() as client:
            await asyncio.sleep(0.1)
            time.sleep(work)  # noqa: ASYNC251 (a client that cannot keep up)
            await asyncio.sleep(0.1)
        return client.health()

    return asyncio.run(main())


def test_a_blocked_event_loop_is_saturation() -> None:
    health = watch(0.4)
    assert health.saturated
    assert health.lag_max_ms >= 350


def test_an_idle_client_uses_little_of_a_core() -> None:
    assert watch(0).cpu_share < 0.5


def test_counters_are_summed_over_labels() -> None:
    assert read_counters(BEFORE) == {
        "prefix_hits": 15,
        "prefix_queries": 100,
        "queue_s": 1.5,
        "queued": 4,
        "preemptions": 0,
    }


def test_deltas() -> None:
    found = server_delta(read_counters(BEFORE), read_counters(AFTER))
    assert found
    assert found.prefix_hit_rate == pytest.approx(30 / 60)
    assert found.queue_mean_ms == pytest.approx(400 / 8)


@pytest.mark.parametrize("text", [None, "", "up 1\n", "<html>"])
def test_no_metrics_is_no_delta(text: str | None) -> None:
    assert read_counters(text) is None
    assert server_delta(read_counters(text), read_counters(AFTER)) is None


def test_a_restarted_server_is_no_delta() -> None:
    assert server_delta(read_counters(AFTER), read_counters(BEFORE)) is None


def test_an_idle_server_has_no_rates() -> None:
    found = server_delta(read_counters(BEFORE), read_counters(BEFORE))
    assert found
    assert (found.prefix_hit_rate, found.queue_mean_ms, found.preemptions) == (None, None, 0)
