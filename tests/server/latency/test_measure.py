"""Whole measurements against the scripted endpoint."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.latency import table5
from server.latency.endpoint import EndpointError
from server.latency.measure import Plan, Side, compare, compared, run
from server.latency.progress import Lines
from server.latency.results import Results
from server.latency.summary import Group, Limits, StageSummary
from tests.server.latency.scripted import FAULTS, FIRST_S, GAP_S, QUEUE_S, SLOT_S, SLOTS, Scripted

BASE: dict[str, Any] = {
    "levels": [2.0],
    "languages": ["en", "ar"],
    "prompt_words": [12],
    "reply_tokens": 10,
    "fixed_length": True,
    "requests": 6,
    "seconds": 30.0,
    "max_requests": 500,
    "max_seconds": 60.0,
    "timeout_s": 10.0,
}


def measured(scripted: Scripted, script: str, **changes: Any) -> Results:
    side, plan = Side(url=scripted.url, model=script), Plan.model_validate({**BASE, **changes})
    return asyncio.run(run(side, plan, allow_remote=False, command="test", watcher=Lines()))


def test_a_closed_loop_keeps_its_concurrency_and_stops_at_its_requests(scripted: Scripted) -> None:
    results = measured(scripted, "steady", levels=[3.0], requests=9)
    stage = results.stages[0]
    assert scripted.most_running == 3
    assert (stage.total.requests, stage.total.ok, len(results.requests), len(scripted.seen)) == (9, 9, 9, 10)
    assert stage.total.ttft_ms is not None
    assert 1e3 * FIRST_S <= stage.total.ttft_ms.p50 < 1e3 * (FIRST_S + 5)  # the machine may be busy


def test_throughput_is_tokens_over_the_time_that_load_was_full(scripted: Scripted) -> None:
    """Each of two users needs FIRST_S + 9 GAP_S for 10 tokens; a slow machine can only take longer."""
    stage = measured(scripted, "steady", requests=8).stages[0]
    expected = 2 * 10 / (FIRST_S + 9 * GAP_S)
    assert 0.04 * expected < stage.total.tokens_per_s < 1.1 * expected
    assert stage.total.characters_per_s == pytest.approx(5 * stage.total.tokens_per_s, rel=1e-6)
    assert stage.total.words_per_s == pytest.approx(stage.total.tokens_per_s, rel=1e-6)


def test_every_fault_is_reported_and_only_good_replies_are_timed(scripted: Scripted) -> None:
    total = measured(scripted, "faults", levels=[1.0], requests=len(FAULTS)).stages[0].total
    assert (total.requests, total.ok) == (len(FAULTS), 1)
    assert total.failures == {
        "http error (429)": 1,
        "stream error": 1,
        "dropped": 1,
        "short (stop)": 1,
        "aborted (abort)": 1,
        "empty": 1,
    }
    assert total.finish_reasons == {"length": 2, "none": 3, "stop": 1, "abort": 1}
    assert total.latency_ms is not None
    assert total.latency_ms.count == 1


def test_the_servers_own_metrics_are_the_gain_in_each_stage(scripted: Scripted) -> None:
    for stage in measured(scripted, "steady", levels=[1.0, 2.0], requests=4).stages:
        assert stage.server is not None
        assert stage.server.prefix_hit_rate == pytest.approx(30 / 40)
        assert stage.server.queue_mean_ms == pytest.approx(1e3 * QUEUE_S)
        assert stage.total.cached_share == pytest.approx(30 / 40)


def test_languages_are_told_apart(scripted: Scripted) -> None:
    stage = measured(scripted, "steady", requests=6).stages[0]
    assert {language: group.requests for language, group in stage.languages.items()} == {"en": 3, "ar": 3}


def test_goodput_counts_replies_within_both_limits(scripted: Scripted) -> None:
    easy, hard = Limits(ttft_ms=5000, tpot_ms=1000), Limits(ttft_ms=1e3 * FIRST_S / 2, tpot_ms=1000)
    kept = measured(scripted, "steady", limits=easy).stages[0].total
    lost = measured(scripted, "steady", limits=hard).stages[0].total
    assert kept.goodput_per_s == pytest.approx(kept.requests_per_s)
    assert (kept.requests_per_s > 0, lost.goodput_per_s) == (True, 0)


def test_an_open_loop_does_not_wait_for_replies(scripted: Scripted) -> None:
    results = measured(scripted, "steady", mode="open", levels=[40.0], requests=40)
    assert scripted.most_running > 5
    due = [record.started_s for record in results.requests]
    assert 0.3 < max(due) < 5  # 39 exponential gaps of 25 ms, seeded, on a machine that may be busy
    assert all(record.late_s >= 0 for record in results.requests)


def test_a_sweep_finds_the_knee_of_a_server_with_four_slots(scripted: Scripted) -> None:
    results = measured(scripted, "slots", mode="sweep", levels=[64.0], requests=8)
    levels = [stage.level for stage in results.stages]
    assert levels[:4] == [1, 2, 4, 8]
    assert 64 not in levels
    assert results.knee == SLOTS
    best = max(stage.total.tokens_per_s for stage in results.stages)
    assert 0.4 * 10 * SLOTS / SLOT_S < best < 1.1 * 10 * SLOTS / SLOT_S


def test_conversations_carry_their_history_and_pause(scripted: Scripted) -> None:
    results = measured(
        scripted, "steady", mode="conversations", levels=[1.0], turns=3, think_s=0.05, requests=6, reply_tokens=3
    )
    roles = [[message["role"] for message in seen.body["messages"]] for seen in scripted.seen[1:]]
    pair = ["user", "assistant"]
    assert roles == 2 * [["user"], [*pair, "user"], [*pair, *pair, "user"]]
    assert scripted.seen[2].body["messages"][1]["content"] == "word word word "
    assert [record.turn for record in results.requests] == [1, 2, 3, 1, 2, 3]
    assert set(results.stages[0].turns) == {1, 2, 3}


def test_a_failed_reply_ends_its_conversation(scripted: Scripted) -> None:
    results = measured(scripted, "faults", mode="conversations", levels=[1.0], turns=4, think_s=0, requests=3)
    assert [(record.turn, record.outcome) for record in results.requests] == [
        (1, "ok"),
        (2, "http error"),
        (1, "stream error"),
    ]


def test_table5_mode_feeds_the_table(scripted: Scripted, tmp_path: Path) -> None:
    results = measured(scripted, "slots", mode="table5", levels=[1.0], reply_tokens=512, requests=3)
    assert scripted.seen[-1].body["max_tokens"] == 512
    path = tmp_path / "results.json"
    path.write_text(results.model_dump_json())
    found = table5.measured(path)
    assert SLOT_S <= found.latency_s < SLOT_S + 0.4
    assert found.tokens_per_s == pytest.approx(512 / found.latency_s)
    line = table5.lines(table5.load(), found)[-1]
    assert line.measured == found


def test_other_results_are_not_table_5(scripted: Scripted, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(measured(scripted, "steady", requests=2).model_dump_json())
    with pytest.raises(ValueError, match="table5"):
        table5.measured(path)


@pytest.mark.parametrize(
    ("changes", "most"),
    [({"max_requests": 3}, 3), ({"seconds": 0.5, "requests": 400}, 12), ({"max_seconds": 0.5, "requests": 400}, 12)],
)
def test_every_bound_stops_a_run(scripted: Scripted, changes: dict[str, Any], most: int) -> None:
    results = measured(scripted, "steady", levels=[2.0, 2.0], **changes)
    assert 1 <= len(results.requests) <= most


def test_a_dead_endpoint_is_one_error(scripted: Scripted) -> None:
    plan = Plan.model_validate(BASE)
    side = Side(url="http://127.0.0.1:9")
    with pytest.raises(EndpointError, match="lists no model"):
        asyncio.run(run(side, plan, allow_remote=False, command="", watcher=Lines()))


def test_comparing_an_endpoint_with_itself_finds_no_difference(scripted: Scripted) -> None:
    plan = Plan.model_validate({**BASE, "rounds": 3, "requests": 4, "reply_tokens": 5})
    a, b = Side(name="A", url=scripted.url, model="steady"), Side(name="B", url=scripted.url, model="steady")
    results = asyncio.run(compare(a, b, plan, allow_remote=False, command="", watcher=Lines()))
    assert [stage.endpoint for stage in results.stages] == ["A", "B", "B", "A", "A", "B"]
    found = results.comparisons[0]
    assert found.rounds == 3
    assert found.failures == {"A": 0, "B": 0}
    assert found.throughput_ratio.value == pytest.approx(1, abs=0.25)
    texts = {seen.body["messages"][0]["content"].split()[0] for seen in scripted.seen[2:]}
    assert len(texts) == len(scripted.seen) - 2  # never the same first word: nothing was cached for the other


def test_an_endpoint_that_does_not_stream_cannot_be_compared(scripted: Scripted) -> None:
    plan = Plan.model_validate({**BASE, "levels": [1.0], "rounds": 2, "requests": 2, "reply_tokens": 5})
    a, b = Side(name="A", url=scripted.url, model="steady"), Side(name="B", url=scripted.url, model="one-event")
    found = asyncio.run(compare(a, b, plan, allow_remote=False, command="", watcher=Lines())).comparisons
    assert found == []  # one event per reply has no TPOT: nothing honest to compare


def stage(rate: float, ttft: float, tpot: float) -> StageSummary:
    def around(value: float) -> dict[str, Any]:
        names = ("mean", "p50", "p90", "p95", "p99", "p50_low", "p50_high")
        return {"count": 5, **dict.fromkeys(names, value)}

    group = Group.model_validate(
        dict.fromkeys(Group.model_fields, None)
        | {"requests": 5, "ok": 5, "failures": {}, "finish_reasons": {}, "tokens_per_s": rate, "requests_per_s": 1}
        | {"characters_per_s": 1, "words_per_s": 1, "ttft_ms": around(ttft), "tpot_ms": around(tpot)}
    )
    client = {"lag_p99_ms": 0, "lag_max_ms": 0, "cpu_share": 0, "saturated": False}
    return StageSummary.model_validate(
        {"number": 1, "mode": "closed", "level": 8, "endpoint": "A", "seconds": 1, "window_s": 1, "late_p99_ms": 0}
        | {"total": group, "languages": {}, "turns": {}, "client": client, "server": None}
    )


def test_drift_that_hits_both_alike_cancels() -> None:
    """The machine slows down fourfold over the rounds; A stays at 0.97 of B and 2 ms behind."""
    pairs = [
        (stage(97 / slow, 12 * slow + 2, 5 * slow), stage(100 / slow, 12 * slow, 5 * slow)) for slow in (1, 2, 3, 4)
    ]
    found = compared(8, pairs)
    assert found
    for interval, value in ((found.throughput_ratio, 0.97), (found.ttft_added_ms, 2.0), (found.tpot_ratio, 1.0)):
        assert [interval.low, interval.value, interval.high] == pytest.approx([value] * 3)


def test_noise_widens_the_interval_around_the_ratio() -> None:
    pairs = [(stage(100 * up, 10, 5), stage(100, 10, 5)) for up in (0.9, 1.1, 0.95, 1.06)]
    found = compared(8, pairs)
    assert found
    ratio = found.throughput_ratio
    assert ratio.value == pytest.approx(math.prod((0.9, 1.1, 0.95, 1.06)) ** 0.25)
    assert 0.9 <= ratio.low < ratio.value < ratio.high <= 1.1


@pytest.mark.parametrize(
    "change",
    [
        {"levels": []},
        {"levels": [0]},
        {"levels": [1.5]},
        {"languages": ["fr"]},
        {"requests": 0},
        {"mode": "fast"},
        {"x": 1},
    ],
)
def test_impossible_plans_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Plan.model_validate({**BASE, **change})
