"""One request at a time against the scripted endpoint, whose delays and faults are known."""

from __future__ import annotations

import asyncio
import time

import pytest

from server.latency.endpoint import Endpoint, EndpointError, Sample, Turn, check_url, find_model, http_session, warmed
from tests.server.latency.scripted import FIRST_S, GAP_S, Scripted

TOKENS = 12
SLACK_S = 5.0  # the machine may be busy; a delay in the wrong unit is out by far more


async def ask(scripted: Scripted, script: str, timeout_s: float = 10, url: str = "") -> Sample:
    async with http_session() as http:
        endpoint = Endpoint(http, url or scripted.url, script, TOKENS, fixed_length=True, timeout_s=timeout_s)
        turn = Turn([{"role": "user", "content": "Hello"}], "en", 1, time.perf_counter())
        return await endpoint.send(turn, 1, turn.due)


def test_delays_are_measured_where_they_happen(scripted: Scripted) -> None:
    record = asyncio.run(ask(scripted, "steady")).record
    assert record.outcome == "ok"
    assert record.ttft_s is not None
    assert record.first_chunk_s is not None
    assert record.tpot_s is not None
    assert FIRST_S <= record.ttft_s < FIRST_S + SLACK_S
    assert record.first_chunk_s < record.ttft_s < record.latency_s
    assert 0.5 * GAP_S < record.tpot_s < GAP_S + SLACK_S / TOKENS
    assert FIRST_S + (TOKENS - 1) * GAP_S <= record.latency_s < FIRST_S + TOKENS * GAP_S + SLACK_S
    assert (record.completion_tokens, record.prompt_tokens, record.cached_tokens) == (TOKENS, 40, 30)
    assert (record.characters, record.words, record.checkpoint) == (5 * TOKENS, TOKENS, "c0ffee")


def test_several_tokens_in_one_event_share_its_time(scripted: Scripted) -> None:
    sample = asyncio.run(ask(scripted, "bursts"))
    assert [event.total_tokens for event in sample.reply.events] == [4, 8, 12]
    assert [tokens for _, tokens in sample.reply.gaps()] == [4, 4]
    first, *_, last = sample.reply.events
    assert sample.record.tpot_s == pytest.approx((last.at - first.at) / 8)


@pytest.mark.parametrize("script", ["duplicate-usage", "plain"])
def test_usage_once_or_twice_counts_once(scripted: Scripted, script: str) -> None:
    record = asyncio.run(ask(scripted, script)).record
    assert (record.outcome, record.completion_tokens, record.tokens_from) == ("ok", TOKENS, "usage")


@pytest.mark.parametrize(
    ("script", "outcome", "status", "finish"),
    [
        ("http-429", "http error", 429, None),
        ("error-event", "stream error", 200, None),
        ("dropped", "dropped", 200, None),
        ("unfinished", "dropped", 200, "length"),
        ("short", "short", 200, "stop"),
        ("abort", "aborted", 200, "abort"),
        ("empty", "empty", 200, "length"),
    ],
)
def test_faults_are_failures(scripted: Scripted, script: str, outcome: str, status: int, finish: str | None) -> None:
    record = asyncio.run(ask(scripted, script)).record
    assert (record.outcome, record.status, record.finish_reason) == (outcome, status, finish)


def test_a_failure_says_why(scripted: Scripted) -> None:
    assert "slow down" in asyncio.run(ask(scripted, "http-429")).record.error
    assert asyncio.run(ask(scripted, "error-event")).record.error == "engine died"


def test_a_stalled_stream_times_out(scripted: Scripted) -> None:
    record = asyncio.run(ask(scripted, "stall", timeout_s=0.3)).record
    assert record.outcome == "timeout"
    assert 0.3 <= record.latency_s < 0.3 + SLACK_S


def test_nothing_listening_is_a_failure_not_an_exception(scripted: Scripted) -> None:
    record = asyncio.run(ask(scripted, "steady", url="http://127.0.0.1:9")).record
    assert (record.outcome, record.status) == ("no connection", None)


def test_latency_counts_from_when_the_request_was_due(scripted: Scripted) -> None:
    async def late() -> Sample:
        async with http_session() as http:
            endpoint = Endpoint(http, scripted.url, "steady", TOKENS, fixed_length=True, timeout_s=10)
            turn = Turn([{"role": "user", "content": "Hello"}], "en", 1, time.perf_counter() - 1.0)
            return await endpoint.send(turn, 1, turn.due)

    record = asyncio.run(late()).record
    assert record.late_s >= 1.0
    assert record.ttft_s is not None
    assert record.ttft_s >= 1.0 + FIRST_S


def test_an_endpoint_that_refuses_token_counts_is_measured_without(scripted: Scripted) -> None:
    async def warm() -> Endpoint:
        async with http_session() as http:
            endpoint, checkpoint = await warmed(
                Endpoint(http, scripted.url, "plain-openai", TOKENS, fixed_length=True, timeout_s=10)
            )
            assert checkpoint == "c0ffee"
            return endpoint

    assert not asyncio.run(warm()).token_counts
    assert [seen.body["stream_options"].get("continuous_usage_stats") for seen in scripted.seen] == [True, None]


def test_an_endpoint_that_refuses_everything_cannot_be_measured(scripted: Scripted) -> None:
    async def warm() -> None:
        async with http_session() as http:
            await warmed(Endpoint(http, scripted.url, "http-429", TOKENS, fixed_length=True, timeout_s=10))

    with pytest.raises(EndpointError, match="429"):
        asyncio.run(warm())


def test_models_are_listed_and_the_key_is_sent_only_when_set(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def first_model() -> str:
        async with http_session() as http:
            return await find_model(http, scripted.url)

    assert asyncio.run(first_model()) == "steady"
    asyncio.run(ask(scripted, "steady"))
    assert "authorization" not in scripted.seen[-1].headers
    monkeypatch.setenv("BIMEDIX_API_KEY", "secret-for-this-test")
    asyncio.run(ask(scripted, "steady"))
    assert scripted.seen[-1].headers["authorization"] == "Bearer secret-for-this-test"


@pytest.mark.parametrize("url", ["http://localhost:1/v1/", "http://127.0.0.1:1", "http://[::1]:1/v1"])
def test_loopback_urls_are_accepted(url: str) -> None:
    assert not check_url(url, allow_remote=False).endswith(("/v1", "/"))


@pytest.mark.parametrize("url", ["http://10.0.0.1", "https://api.example.org/v1", "http://0.0.0.0:8000"])
def test_other_machines_need_a_flag(url: str) -> None:
    with pytest.raises(EndpointError, match="--allow-remote"):
        check_url(url, allow_remote=False)
    assert check_url(url, allow_remote=True)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://u:p@127.0.0.1"])
def test_what_is_no_plain_url_is_refused(url: str) -> None:
    with pytest.raises(EndpointError, match="plain"):
        check_url(url, allow_remote=True)
