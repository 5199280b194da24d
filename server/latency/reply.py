"""One streamed reply: what arrived when, how it ended, and whether it counts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Outcome = Literal[
    "ok", "http error", "stream error", "dropped", "timeout", "no connection", "empty", "aborted", "short"
]
GOOD_ENDINGS = ("stop", "length")


class Record(BaseModel):
    """One request as the results file keeps it. Times in seconds; None where the reply never got that far."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: int
    endpoint: str
    language: str
    turn: int
    prompt_words: int
    started_s: float
    late_s: float
    outcome: Outcome
    status: int | None
    finish_reason: str | None
    error: str
    first_chunk_s: float | None
    ttft_s: float | None
    tpot_s: float | None
    latency_s: float
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int
    tokens_from: Literal["usage", "events"]
    characters: int
    words: int
    checkpoint: str | None


@dataclass(frozen=True)
class Event:
    """Text that became visible: when (seconds after the request was due), characters, tokens so far if told."""

    at: float
    characters: int
    total_tokens: int | None


@dataclass
class Reply:
    """The stream of one reply, fed line by line."""

    events: list[Event] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    first_chunk: float | None = None
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    done: bool = False
    checkpoint: str | None = None

    def feed(self, line: bytes, at: float) -> None:
        """Take one line of the event stream that arrived `at`. Comments and blank lines are ignored."""
        if not line.startswith(b"data:"):
            return
        payload = line[5:].strip()
        if payload == b"[DONE]":
            self.done = True
            return
        try:
            self._chunk(json.loads(payload), at)
        except (ValueError, TypeError, AttributeError, LookupError):
            self.error = self.error or f"malformed event: {payload[:120].decode(errors='replace')}"

    def _chunk(self, chunk: dict[str, Any], at: float) -> None:
        if chunk.get("error"):
            error = chunk["error"]
            self.error = str(error.get("message") if isinstance(error, dict) else error) or "error event"
            return
        # Usage is cumulative and may come with every event, once, or twice: the last one counts, never the sum.
        self.usage = chunk.get("usage") or self.usage
        if not chunk.get("choices"):
            return
        choice = chunk["choices"][0]
        self.first_chunk = at if self.first_chunk is None else self.first_chunk
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        text = (choice.get("delta") or {}).get("content")
        if text:
            self.parts.append(text)
            self.events.append(Event(at, len(text), (chunk.get("usage") or {}).get("completion_tokens")))

    @property
    def text(self) -> str:
        return "".join(self.parts)

    @property
    def tokens(self) -> int:
        """Completion tokens by usage; without usage, one per event with text, which is a lower bound."""
        return self.usage.get("completion_tokens") or len(self.events)

    def cumulative_tokens(self) -> list[float]:
        """Tokens received up to each event: as told, else the total shared out by characters."""
        told = [event.total_tokens for event in self.events if event.total_tokens is not None]
        if len(told) == len(self.events):
            return [float(count) for count in told]
        characters, seen, shares = max(1, sum(event.characters for event in self.events)), 0, []
        for event in self.events:
            seen += event.characters
            shares.append(self.tokens * seen / characters)
        return shares

    def gaps(self) -> list[tuple[float, float]]:
        """(seconds since the previous event, tokens it brought) for every event with text after the first."""
        totals, events = self.cumulative_tokens(), self.events
        return [(b.at - a.at, y - x) for a, b, x, y in zip(events, events[1:], totals, totals[1:], strict=False)]

    def tpot(self) -> float | None:
        """Mean seconds per token after the first event, however many tokens that one brought."""
        totals = self.cumulative_tokens()
        if len(totals) < 2 or totals[-1] <= totals[0]:
            return None
        return (self.events[-1].at - self.events[0].at) / (totals[-1] - totals[0])

    def outcome(self, forced_tokens: int | None) -> Outcome:
        """How a reply with status 200 ended; `forced_tokens` is the exact length asked for, if one was."""
        if self.error:
            return "stream error"
        if not self.done:
            return "dropped"
        if self.finish_reason not in GOOD_ENDINGS:
            return "aborted"
        if not self.events:
            return "empty"
        counted = self.usage.get("completion_tokens")
        if forced_tokens and (self.finish_reason != "length" or (counted or forced_tokens) < forced_tokens):
            return "short"
        return "ok"
