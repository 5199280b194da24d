"""Streams with hand-set arrival times: every number is exact."""

from __future__ import annotations

import json

import pytest

from server.latency.reply import Reply


def event(text: str | None = None, finish: str | None = None, tokens: int | None = None) -> bytes:
    delta = {} if text is None else {"content": text}
    found: dict[str, object] = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    if tokens is not None:
        found["usage"] = {"completion_tokens": tokens}
    return f"data: {json.dumps(found)}\n".encode()


def usage(tokens: int) -> bytes:
    return f'data: {{"choices": [], "usage": {{"completion_tokens": {tokens}, "prompt_tokens": 9}}}}\n'.encode()


def reply(*lines: tuple[float, bytes]) -> Reply:
    found = Reply()
    for at, line in lines:
        found.feed(line, at)
    return found


DONE = b"data: [DONE]\n"


def test_ttft_is_the_first_text_not_the_role_chunk_or_an_empty_delta() -> None:
    role = b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}\n'
    found = reply((0.1, b": ping\n"), (0.2, role), (0.3, event("")), (0.9, event("Hi")), (1.0, DONE))
    assert found.first_chunk == 0.2
    assert found.events[0].at == 0.9


def test_tpot_leaves_out_the_first_event_however_many_tokens_it_brought() -> None:
    found = reply((1.0, event("abc", tokens=3)), (1.4, event("de", tokens=5)), (2.0, event("f", tokens=8)), (2.1, DONE))
    assert found.tpot() == pytest.approx((2.0 - 1.0) / (8 - 3))
    assert [gap for gap, _ in found.gaps()] == pytest.approx([0.4, 0.6])
    assert [tokens for _, tokens in found.gaps()] == [2, 3]


def test_tokens_without_text_count_with_the_next_text() -> None:
    """A byte-fallback character of three tokens shows only with the last of them."""
    held_back = (event(tokens=2), event(tokens=3))
    found = reply((1.0, event("a", tokens=1)), (1.1, held_back[0]), (1.2, held_back[1]), (1.3, event("٣", tokens=4)))
    assert [tokens for _, tokens in found.gaps()] == [3]
    assert found.gaps()[0][0] == pytest.approx(0.3)


def test_without_counts_in_every_event_the_total_is_shared_by_characters() -> None:
    found = reply((1.0, event("aa")), (2.0, event("bbbb")), (3.0, event("cc", "stop")), (3.1, usage(4)), (3.1, DONE))
    assert found.cumulative_tokens() == [1.0, 3.0, 4.0]
    assert found.tpot() == pytest.approx(2.0 / 3)


def test_duplicate_usage_is_not_added_up() -> None:
    found = reply((1.0, event("a", tokens=1)), (2.0, event("b", "length", tokens=2)), (2.0, usage(2)), (2.0, usage(2)))
    assert found.tokens == 2


def test_without_usage_events_are_the_lower_bound() -> None:
    assert reply((1.0, event("a")), (2.0, event("b"))).tokens == 2


@pytest.mark.parametrize(
    ("lines", "outcome"),
    [
        ([event("a"), event(None, "stop"), DONE], "ok"),
        ([event("a"), event("b", "length"), DONE], "ok"),
        ([event("a"), event("b", "length")], "dropped"),
        ([event("a"), DONE], "aborted"),
        ([event("a"), event(None, "abort"), DONE], "aborted"),
        ([event(None, "stop"), DONE], "empty"),
        ([event("a"), b'data: {"error": {"message": "died"}}\n', DONE], "stream error"),
        ([event("a"), b'data: {"error": "died"}\n', event(None, "stop"), DONE], "stream error"),
        ([b"data: {broken\n", event("a", "stop"), DONE], "stream error"),
        ([b'data: {"choices": 7}\n', event("a", "stop"), DONE], "stream error"),
        ([], "dropped"),
    ],
)
def test_outcomes(lines: list[bytes], outcome: str) -> None:
    assert reply(*((float(at), line) for at, line in enumerate(lines))).outcome(None) == outcome


@pytest.mark.parametrize(
    ("finish", "tokens", "outcome"),
    [("length", 4, "ok"), ("length", 3, "short"), ("stop", 4, "short"), ("stop", 2, "short"), ("length", None, "ok")],
)
def test_a_fixed_length_must_be_reached(finish: str, tokens: int | None, outcome: str) -> None:
    last = [(2.0, usage(tokens))] if tokens else []
    found = reply((1.0, event("a")), (2.0, event("b", finish)), *last, (2.0, DONE))
    assert found.outcome(4) == outcome


def test_a_single_event_has_no_tpot() -> None:
    assert reply((1.0, event("all of it", "stop", tokens=8)), (1.0, DONE)).tpot() is None
