"""From timed replies to the numbers of one stage: latency, throughput, goodput and failures, by language and turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

from pydantic import BaseModel, ConfigDict, Field

from server.latency.endpoint import Sample
from server.latency.load import Stage
from server.latency.stats import Quantiles, quantiles, weighted_quantiles
from server.latency.watch import ClientHealth, ServerDelta


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(Frozen):
    """A reply is good when both hold (goodput: DistServe, arXiv 2401.09670). Milliseconds."""

    ttft_ms: float = Field(gt=0)
    tpot_ms: float = Field(gt=0)


class Group(Frozen):
    """Requests that belong together. Latencies in milliseconds; rates per second over the stage's full-load window."""

    requests: int
    ok: int
    failures: dict[str, int] = Field(description="By outcome, with the HTTP status or finish reason.")
    finish_reasons: dict[str, int]
    ttft_ms: Quantiles | None
    tpot_ms: Quantiles | None
    latency_ms: Quantiles | None
    itl_ms: dict[str, float] | None = Field(description="Per token: an event with n tokens counts n times gap / n.")
    gap_ms: dict[str, float] | None = Field(description="Between events with text: the pauses a reader sees.")
    tokens_per_s: float
    characters_per_s: float
    words_per_s: float
    stream_tokens_per_s: float | None = Field(description="Median over replies of 1 / TPOT.")
    stream_characters_per_s: float | None = Field(description="Median over replies, after the first event.")
    stream_words_per_s: float | None
    requests_per_s: float
    goodput_per_s: float | None = Field(description="Replies a second within the limits; None without limits.")
    cached_share: float | None = Field(description="Prompt tokens from the prefix cache, where usage tells.")


class StageSummary(Frozen):
    """One stage: `level` is users in a closed loop or conversations, requests a second in an open loop."""

    number: int
    mode: str
    level: float
    endpoint: str
    seconds: float
    window_s: float = Field(description="From the start until offered load fell: what the rates are over.")
    late_p99_ms: float
    total: Group
    languages: dict[str, Group]
    turns: dict[int, Group]
    client: ClientHealth
    server: ServerDelta | None


def summarise(
    stage: Stage,
    mode: str,
    level: float,
    *,
    client: ClientHealth,
    server: ServerDelta | None,
    limits: Limits | None,
) -> StageSummary:
    """Everything about one finished stage that had at least one request."""
    samples = stage.samples
    ended = max((sample.due + sample.record.latency_s for sample in samples), default=stage.began)
    until = ended if mode == "open" else (stage.full_until or ended)
    lateness = quantiles([1e3 * sample.record.late_s for sample in samples])
    window = (stage.began, max(until, stage.began + 1e-9))
    turns = sorted({sample.record.turn for sample in samples})
    return StageSummary(
        number=stage.number,
        mode=mode,
        level=level,
        endpoint=stage.endpoint.name,
        seconds=ended - stage.began,
        window_s=window[1] - window[0],
        late_p99_ms=lateness.p99 if lateness else 0.0,
        total=group(samples, window, limits),
        languages={
            language: group([s for s in samples if s.record.language == language], window, limits)
            for language in sorted({sample.record.language for sample in samples})
        },
        turns={
            turn: group([s for s in samples if s.record.turn == turn], window, limits)
            for turn in (turns if len(turns) > 1 else [])
        },
        client=client,
        server=server,
    )


def group(samples: Sequence[Sample], window: tuple[float, float], limits: Limits | None) -> Group:
    """Summarise samples; failed replies count as failures and nowhere else. `window` in perf_counter seconds."""
    good = [sample for sample in samples if sample.record.outcome == "ok"]
    records = [sample.record for sample in good]
    tpots = [record.tpot_s for record in records if record.tpot_s is not None]
    gaps = [gap for sample in good for gap in sample.reply.gaps()]
    seconds = window[1] - window[0]
    finished = [sample for sample in good if sample.due + sample.record.latency_s <= window[1] + 1e-9]
    tokens, characters, words = _delivered(good, window)
    cached = [r for r in records if r.cached_tokens is not None and r.prompt_tokens]
    return Group(
        requests=len(samples),
        ok=len(good),
        failures=dict(Counter(_failure(s) for s in samples if s.record.outcome != "ok").most_common()),
        finish_reasons=dict(Counter(s.record.finish_reason or "none" for s in samples).most_common()),
        ttft_ms=_milliseconds([r.ttft_s for r in records if r.ttft_s is not None]),
        tpot_ms=_milliseconds(tpots),
        latency_ms=_milliseconds([r.latency_s for r in records]),
        itl_ms=weighted_quantiles([(1e3 * gap / tokens, tokens) for gap, tokens in gaps if tokens > 0]),
        gap_ms=weighted_quantiles([(1e3 * gap, 1.0) for gap, _ in gaps]),
        tokens_per_s=tokens / seconds,
        characters_per_s=characters / seconds,
        words_per_s=words / seconds,
        stream_tokens_per_s=_median([1 / tpot for tpot in tpots if tpot > 0]),
        stream_characters_per_s=_median([rate for s in good if (rate := _stream_rate(s, 1.0)) is not None]),
        stream_words_per_s=_median([rate for s in good if (rate := _stream_rate(s, _words_per_character(s)))]),
        requests_per_s=len(finished) / seconds,
        goodput_per_s=sum(_meets(s, limits) for s in finished) / seconds if limits else None,
        cached_share=sum(r.cached_tokens or 0 for r in cached) / sum(r.prompt_tokens or 0 for r in cached)
        if cached
        else None,
    )


def _failure(sample: Sample) -> str:
    record = sample.record
    detail = {"http error": record.status, "aborted": record.finish_reason, "short": record.finish_reason}
    return f"{record.outcome} ({detail[record.outcome]})" if record.outcome in detail else record.outcome


def _delivered(good: Sequence[Sample], window: tuple[float, float]) -> tuple[float, float, float]:
    """Tokens, characters and words of successful replies that arrived within the window."""
    tokens = characters = words = 0.0
    for sample in good:
        inside = [event.at + sample.due <= window[1] for event in sample.reply.events]
        count = sum(inside)
        seen = sum(event.characters for event in sample.reply.events[:count])
        tokens += sample.reply.cumulative_tokens()[count - 1] if count else 0.0
        characters += seen
        words += seen * _words_per_character(sample)
    return tokens, characters, words


def _words_per_character(sample: Sample) -> float:
    return sample.record.words / max(1, sample.record.characters)


def _stream_rate(sample: Sample, scale: float) -> float | None:
    events = sample.reply.events
    seconds = events[-1].at - events[0].at
    return scale * sum(event.characters for event in events[1:]) / seconds if seconds > 0 else None


def _meets(sample: Sample, limits: Limits | None) -> bool:
    record = sample.record
    if limits is None or record.ttft_s is None:
        return False
    return 1e3 * record.ttft_s <= limits.ttft_ms and 1e3 * (record.tpot_s or 0.0) <= limits.tpot_ms


def _milliseconds(seconds: Sequence[float]) -> Quantiles | None:
    return quantiles([1e3 * value for value in seconds])


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None
